"""Value control: the value has an effect in both branches, several attributes go in order, and what is refused. Numbers: tests/parity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from small_dit import tokens
from tiny_pipeline import latents, load

from fluxsmith.config.control import Ground
from fluxsmith.controls.value import Config, Rows
from fluxsmith.controls.value_model import ValueEncoder, load_value_encoder
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.safetensors import save_weights

Entry = Callable[..., dict[str, Any]]


def write(path: Path, seed: int, width: int = tiny_run.TEXT, count: int = 3) -> str:
    net, generator = ValueEncoder(8, width, count), torch.Generator().manual_seed(seed)
    save_weights(path, {name: torch.randn(value.shape, generator=generator) for name, value in net.state_dict().items()})
    return str(path)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    folder = tmp_path_factory.mktemp("values")
    files = {name: write(folder / f"{name}.safetensors", number) for number, name in enumerate(("brightness", "detail"))}

    def make(name: str, value: float | None) -> dict[str, Any]:
        return {"type": "value", "name": name, "path": files[name], "value": value}

    return make


@pytest.mark.ledger("DS-36")
def test_the_value_has_an_effect_in_both_branches(plain_model: Path, entry: Entry) -> None:
    pipeline = load(plain_model, entry("brightness", 0.2))
    low, high = latents(pipeline), latents(pipeline, controls={"brightness": {"value": 0.9}})
    assert (low - high).abs().max() > 1e-4
    assert (low - latents(load(plain_model))).abs().max() > 1e-4
    assert torch.allclose(latents(pipeline, cfg=3.0, negative="a red circle"), low, atol=1e-5)


def test_several_attributes_follow_one_another(plain_model: Path, entry: Entry) -> None:
    both, turned = ([entry(name, 0.5) for name in names] for names in (("brightness", "detail"), ("detail", "brightness")))
    pipeline = load(plain_model, *both)
    one = latents(load(plain_model, both[0]))
    assert (latents(pipeline) - one).abs().max() > 1e-4
    changed = latents(pipeline, controls={"detail": {"value": 0.9}})
    assert (latents(pipeline) - changed).abs().max() > 1e-4
    assert torch.allclose(latents(pipeline), latents(load(plain_model, *turned)), atol=1e-5)  # places in the text are all alike
    made = [Rows(torch.full((1, 2, tiny_run.TEXT), float(number))) for number in (1, 2)]
    rows = made[1].tokens(made[0].tokens(tokens())).txt[0, :, 0]
    assert rows[-4:].tolist() == [1, 1, 2, 2]


def test_a_file_comes_back(tmp_path: Path) -> None:
    net = load_value_encoder(write(tmp_path / "a.safetensors", 3))
    assert net(torch.tensor([0.1, 0.7])).shape == (2, 3, tiny_run.TEXT)
    assert net(torch.tensor([0.1])).isfinite().all()


def test_what_is_refused(plain_model: Path, tmp_path: Path, entry: Entry) -> None:
    assert "has no path" in str(next(Config(type="value").misfits(Ground())))
    pipeline = load(plain_model, entry("brightness", None))
    with pytest.raises(ConfigError, match="has no value"):
        latents(pipeline)
    with pytest.raises(ConfigError, match="less than or equal to 1"):
        load(plain_model, entry("brightness", 1.5))
    with pytest.raises(ModelFileError, match="its tokens are 24 wide, the model's text 16"):
        load(plain_model, {"type": "value", "path": write(tmp_path / "wide.safetensors", 0, 24), "value": 0.5})
    with pytest.raises(ModelFileError, match="value_encoder was expected"):
        load(plain_model, {"type": "value", "path": str(plain_model / "ae.safetensors"), "value": 0.5})
    save_weights(tmp_path / "half.safetensors", {"prefer_value_embedder.0.weight": torch.ones(4, 8)})
    with pytest.raises(ModelFileError, match="the value encoder lacks"):
        load_value_encoder(tmp_path / "half.safetensors")
