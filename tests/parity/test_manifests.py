"""The key lists of the real checkpoints: our modules, built from their shapes on the meta device, have exactly these tensors."""

import json
from pathlib import Path

import pytest
from torch import nn

from fluxsmith.models.autoencoder import AutoEncoder, AutoEncoderParams
from fluxsmith.models.fill import meta, shapes_of
from fluxsmith.models.flux import FluxDiT, FluxParams
from fluxsmith.models.text_encoders import CLIP_ROOT, ClipParams, ClipText, T5Params, T5Text

PARAMETERS = {"flux1-dev": 11_901_408_320, "flux1-schnell": 11_891_178_560, "ae": 83_819_683, "t5xxl": 4_762_310_656, "clip_l": 123_060_480}
DITS = ("flux1-dev", "flux1-schnell", "flux1-krea-dev", "flux1-kontext-dev", "flux1-fill-dev", "flux1-canny-dev", "flex2-preview")


def shapes(root: Path, name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((root / f"{name}.json").read_text())["tensors"].items()}


def count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


@pytest.mark.ledger("KS-01")
@pytest.mark.parametrize("name", DITS)
def test_transformer(manifests_root: Path, name: str) -> None:
    expected = shapes(manifests_root, name)
    model = meta(lambda: FluxDiT(FluxParams.from_shapes(expected)))
    assert shapes_of(model) == expected
    assert model.params.axes_dim == (16, 56, 56)
    assert count(model) == PARAMETERS.get(name, count(model))


@pytest.mark.ledger("KS-05")
def test_autoencoder(manifests_root: Path) -> None:
    expected = shapes(manifests_root, "ae")
    model = meta(lambda: AutoEncoder(AutoEncoderParams.from_shapes(expected)))
    assert shapes_of(model) == expected
    assert count(model) == PARAMETERS["ae"]


@pytest.mark.ledger("KS-03")
def test_clip(manifests_root: Path) -> None:
    expected = shapes(manifests_root, "clip_l")
    params = ClipParams.from_shapes(expected)
    model = meta(lambda: ClipText(params))
    assert {CLIP_ROOT + key: shape for key, shape in shapes_of(model.model).items()} == expected
    assert (count(model), params.num_heads, params.eos) == (PARAMETERS["clip_l"], 12, 49407)


@pytest.mark.ledger("KS-04")
def test_t5(manifests_root: Path) -> None:
    expected = shapes(manifests_root, "t5xxl")
    model = meta(lambda: T5Text(T5Params.from_shapes(expected)))
    model.model.encoder.embed_tokens.weight = model.model.shared.weight
    assert shapes_of(model.model) == expected
    assert count(model) == PARAMETERS["t5xxl"]
