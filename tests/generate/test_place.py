"""Where a model is held for drawing: quantised weights, compiled blocks, limits that are found, and what is refused first."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxsmith.config.load import load_model
from fluxsmith.errors import ConfigError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.place import GIB, limit_for, place_of, size_of
from fluxsmith.generate.request import Request
from fluxsmith.models.files import locate
from fluxsmith.quant.base import QuantLinear


def latents(pipeline: Pipeline) -> Tensor:
    with torch.no_grad():
        return pipeline.latents(pipeline.completed(Request("a red circle", width=32, height=32, steps=2)))


def test_quantised_weights_draw_nearly_the_same(tiny_section: dict[str, str], pipeline: Pipeline) -> None:
    plain = latents(pipeline)
    made = Pipeline.load(tiny_section, device="cpu", quant={"type": "int8", "embedders": "same"})
    assert made.models.dit is not None
    kinds = [module for module in made.models.dit.modules() if isinstance(module, QuantLinear)]
    assert any(module is made.models.dit.img_in for module in kinds)
    assert len(kinds) > 10
    apart = (latents(made) - plain).norm() / plain.norm()
    assert 0 < apart < 0.05


def test_quantised_and_streamed_are_the_same_bits_as_quantised(tiny_section: dict[str, str]) -> None:
    whole = latents(Pipeline.load(tiny_section, device="cpu", quant={"type": "int8"}))
    assert torch.equal(latents(Pipeline.load(tiny_section, device="cpu", quant={"type": "int8"}, vram_limit=0.0)), whole)


def test_loras_come_and_go_under_a_limit(tiny_section: dict[str, str], pipeline: Pipeline, make_lora: Any) -> None:
    limited, base = Pipeline.load(tiny_section, device="cpu", vram_limit=0.0), latents(pipeline)
    path = make_lora("limited", seed=3)
    pipeline.load_lora(path, 0.7)
    adapted = latents(pipeline)
    assert torch.equal(latents(limited), base)
    limited.load_lora(path, 0.7)
    assert torch.allclose(latents(limited), adapted, atol=1e-5)
    with pytest.raises(ValueError, match="wait on the host"):
        limited.loras[0].merge()
    limited.clear_loras()
    assert torch.equal(latents(limited), base)


def test_layers_may_wait_in_files(
    tiny_section: dict[str, str], pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []
    inner = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda path, **options: (mapped.append(options["size"]), inner(path, **options))[1])
    made = Pipeline.load(tiny_section, device="cpu", vram_limit=0.0, offload_dir=tmp_path / "waiting")
    assert torch.equal(latents(made), latents(pipeline))
    assert len(mapped) > 2
    assert not [*(tmp_path / "waiting").iterdir()]  # the files are nameless: nothing is left behind
    with pytest.raises(ConfigError, match="no effect"):
        Pipeline.load(tiny_section, device="cpu", offload_dir=tmp_path)


def test_blocks_are_compiled(tiny_section: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: seen.append(options))
    made = Pipeline.load(tiny_section, device="cpu", compile=True)
    assert made.models.dit is not None
    assert [options["dynamic"] for options in seen] == [True] * len(made.models.dit.blocks)


def test_a_limit_is_found_where_the_files_are_larger_than_what_is_free() -> None:
    assert limit_for(None, 100 * GIB) is None
    assert limit_for(24 * GIB, 12 * GIB) is None
    found = limit_for(8 * GIB, 33 * GIB)
    assert found is not None
    assert math.isclose(found, 7.5)


def test_sizes_come_from_headers(tiny_section: dict[str, str], tiny_model: Path) -> None:
    files = locate(load_model({"model": tiny_section}))
    assert 0 < size_of(files, "dit") < files.path("dit").stat().st_size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda"}, "no CUDA device"),
        ({"quant": {"type": "int9"}}, "int9"),
        ({"quant": {"type": "int8", "excluded": []}}, "exclude"),
    ],
)
def test_what_cannot_be_is_refused_first(tiny_section: dict[str, str], options: Any, words: str) -> None:
    if options == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(ConfigError, match=words):
        place_of(options, locate(load_model({"model": tiny_section})), ("dit",))
