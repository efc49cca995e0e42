"""Latents <-> tokens and the one call that training, validation and inference share."""

from pathlib import Path

import pytest
import tiny_run
import torch

from fluxsmith.models.assembly import Level, Models, TextStates, joint_mask, velocity
from fluxsmith.models.files import locate
from fluxsmith.models.loading import LazyModels
from fluxsmith.models.packing import image_ids, pack, text_ids, token_count, unpack


def test_packing_order_and_back() -> None:
    latents = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    corner = latents[0, :, 2:4, 4:6]  # the last cell: channel first, then row, then column
    assert torch.equal(tokens[0, 5], corner.flatten())
    assert torch.equal(unpack(tokens, 4, 6), latents)
    assert token_count(4, 6) == 6
    with pytest.raises(ValueError, match="even"):
        pack(torch.zeros(1, 3, 5, 4))


def test_position_ids() -> None:
    ids = image_ids(2, 4, 6, axis=1.0)
    assert ids.shape == (2, 6, 3)
    assert ids[1].tolist() == [[1, row, column] for row in range(2) for column in range(3)]
    assert not text_ids(1, 4).any()


def test_image_tokens_are_always_seen() -> None:
    mask = joint_mask(torch.tensor([[True, False, True]]), 2)
    assert mask.shape == (1, 1, 1, 5)
    assert mask.flatten().tolist() == [True, False, True, True, True]


@torch.no_grad()
@pytest.mark.ledger("KS-28")
def test_hiding_padding_reaches_the_transformer() -> None:
    dit = tiny_run.random_dit()
    txt, pooled = torch.randn(1, 6, tiny_run.TEXT), torch.randn(1, tiny_run.TEXT)
    mask = torch.tensor([[True, True, False, False, False, False]])
    other = txt.clone()
    other[:, 2:] += 1
    latents, t, guidance = torch.randn(1, 16, 4, 4), torch.tensor([0.5]), torch.tensor([1.0])

    def run(txt: torch.Tensor, *, hidden: bool) -> torch.Tensor:
        return velocity(dit, latents, TextStates(txt, pooled, mask), Level(t, guidance), mask_text=hidden)

    assert run(txt, hidden=False).shape == latents.shape
    torch.testing.assert_close(run(txt, hidden=True), run(other, hidden=True))
    assert not torch.allclose(run(txt, hidden=False), run(other, hidden=False))


def test_parts_that_are_not_loaded() -> None:
    with pytest.raises(ValueError, match="not loaded"):
        Models().part("dit")
    with pytest.raises(ValueError, match="must be loaded"):
        Models().encode_text(["a"])
    assert Models().loaded() == {}


@pytest.mark.ledger("KS-24")
@pytest.mark.ledger("KS-25")
def test_parts_are_loaded_when_asked_for_and_freed(tmp_path: Path) -> None:
    config = tiny_run.config(tiny_run.write_model(tmp_path), tmp_path / "run")
    lazy = LazyModels(locate(config.model), config.model, torch.device("cpu"))
    assert lazy.models.loaded() == {}
    text = lazy.encode_text(["a red circle", ""])
    assert set(lazy.models.loaded()) == {"clip_l", "t5xxl"}
    assert text.txt.shape == (2, 24, tiny_run.TEXT)
    assert lazy.encode_pixels(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 4, 4)
    lazy.free(keep=("ae",))
    assert set(lazy.models.loaded()) == {"ae"}


def test_the_text_digest_names_everything_that_shapes_text(tmp_path: Path) -> None:
    model = tiny_run.write_model(tmp_path / "one")
    other = tiny_run.write_model(tmp_path / "two", seed=1)
    digests = set()
    for folder, changes in (
        (model, {}),
        (other, {}),
        (model, {"model.t5_length": 12}),
        (model, {"model.mask_text": True}),
        (model, {"model.text_dtype": "bf16"}),
    ):
        config = tiny_run.config(folder, tmp_path / "run", changes)
        digests.add(LazyModels(locate(config.model), config.model, torch.device("cpu")).text_digest())
    assert len(digests) == 5
