"""Chroma's transformer: its keys, the rows each block reads, and what hidden text may do. Numbers: tests/parity."""

import re

import pytest
import tiny_run
import torch

from fluxsmith.errors import ModelFileError
from fluxsmith.models.assembly import Level, TextStates, velocity, visible
from fluxsmith.models.chroma import ChromaParams, TableModulation, TableRows, table_rows
from fluxsmith.models.load import build_dit


def test_the_published_table_has_344_rows() -> None:
    assert table_rows(19, 38) == 344


def test_blocks_read_disjoint_rows_that_cover_the_table() -> None:
    dit = tiny_run.random_chroma()
    rows: list[int] = []
    for module in dit.modules():
        if isinstance(module, TableModulation):
            rows += range(module.first_row, module.first_row + 3 * module.parts)
        if isinstance(module, TableRows):
            rows += [module.first_row, module.first_row + 1]
    assert sorted(rows) == list(range(table_rows(1, 1)))
    assert dit.single_blocks[0].modulation.first_row == 0  # single blocks first, then images, then texts
    assert dit.double_blocks[0].img_mod.first_row == 3
    assert dit.double_blocks[0].txt_mod.first_row == 9


def test_keys_have_no_modulation_and_no_embedders() -> None:
    keys = tiny_run.random_chroma().state_dict().keys()
    assert not [key for key in keys if re.search(r"_mod\.|modulation|time_in|vector_in|guidance_in", key)]
    assert "distilled_guidance_layer.layers.1.in_layer.weight" in keys


def test_sizes_are_read_from_shapes() -> None:
    dit = tiny_run.random_chroma()
    shapes = {key: tuple(value.shape) for key, value in dit.state_dict().items()}
    again = build_dit(shapes)
    assert again.params == dit.params
    del shapes["distilled_guidance_layer.in_proj.weight"]
    with pytest.raises(ModelFileError, match="modulation network is incomplete"):
        ChromaParams.from_shapes(shapes)


def test_one_padding_token_is_seen_and_no_more() -> None:
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert visible(mask, 1).tolist() == [[True, True, True, False], [True] * 4]
    assert visible(mask, 0) is mask


@pytest.mark.ledger("KS-44")
@torch.no_grad()
def test_text_beyond_the_first_padding_token_has_no_influence() -> None:
    dit = tiny_run.random_chroma().eval()
    generator = torch.Generator().manual_seed(1)
    txt, latents = torch.randn(1, 6, 16, generator=generator), torch.randn(1, 16, 4, 4, generator=generator)
    mask = torch.tensor([[True, True, False, False, False, False]])

    def run(changed: int | None) -> torch.Tensor:
        states = txt.clone()
        if changed is not None:
            states[:, changed] += 1
        return velocity(dit, latents, TextStates(states, torch.zeros(1, 1), mask), Level(torch.tensor([0.5])), mask_text=True)

    assert torch.equal(run(None), run(3))
    assert not torch.allclose(run(None), run(2))
    assert not torch.allclose(run(None), run(1))
