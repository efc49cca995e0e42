"""LoRA fusion: mergers in the place of LoRAs and out again, absent layers, what cannot be fused. Numbers: tests/parity."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
from lora_sets import block_layers, write_lora
from tiny_pipeline import latents, load, model_section
from torch import Tensor

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.formats.state import AdapterState, LayerState, Part
from fluxsmith.adapters.fusion import LoraFusion, Merger, fusion_of, load_fusion
from fluxsmith.adapters.load import from_state, load_adapter
from fluxsmith.config.load import load_model
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate.job import Job, draw_all
from fluxsmith.io.identify import identify
from fluxsmith.io.keymaps import MAPS
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.fill import meta, shapes_of
from fluxsmith.models.flux import FluxDiT

LACKED = "double_blocks.0.img_attn.proj"


def random_fusion(dit: FluxDiT) -> LoraFusion:
    names = {name: layer.out_features for name, layer in block_layers(dit).items()}
    made = LoraFusion({MAPS["diffsynth"].layer(name)[0].replace(".", "___"): width for name, width in names.items()})  # type: ignore[index]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, dit = tiny_run.write_model(tmp_path_factory.mktemp("model")), tiny_run.random_dit()
    save_weights(folder / "fusion.safetensors", random_fusion(dit).state_dict())
    loras = {"a": write_lora(folder / "a.safetensors", dit), "b": write_lora(folder / "b.safetensors", dit, seed=2, leave_out=LACKED)}
    return {"model": folder, "fusion": folder / "fusion.safetensors", **loras}


def loaded(files: dict[str, Path], *names: str) -> tuple[FluxDiT, list[AdapterSet]]:
    dit = tiny_run.random_dit()
    return dit, [load_adapter(files[name], {"dit": dit}, name=name) for name in names]


@torch.no_grad()
def test_mergers_take_the_place_of_the_loras_and_give_it_back(files: dict[str, Path]) -> None:
    (dit, loras), fusion = loaded(files, "a", "b"), load_fusion(files["fusion"])
    layer, x = dit.get_submodule(LACKED.replace("img_attn.proj", "img_mlp.0")), torch.randn(1, 4, tiny_run.HIDDEN)
    before = layer(x)
    fusion.attach(loras)
    fused = layer(x)
    fusion.detach()
    assert (fused - before).abs().max() > 0.1
    assert torch.equal(layer(x), before)
    assert all(
        list(one.adapters) == [name for name in ("a", "b") if name != "b" or path != LACKED] for path, one in block_layers(dit).items()
    )


@torch.no_grad()
def test_a_layer_that_one_lora_lacks_is_that_of_the_other_alone(files: dict[str, Path]) -> None:
    (dit, loras), (alone, first), fusion = loaded(files, "a", "b"), loaded(files, "a"), load_fusion(files["fusion"])
    x = torch.randn(1, 4, tiny_run.HIDDEN)
    fusion.attach(loras)
    both = dit.get_submodule(LACKED)(x)
    fusion.detach()
    fusion.attach(first)
    assert torch.equal(alone.get_submodule(LACKED)(x), both)


@torch.no_grad()
def test_a_merger_by_its_formula() -> None:
    """At gates of one half and factors of two, it is the plain sum."""
    merger = Merger(3)
    merger.weight_out.fill_(2.0)
    merger.adapters.update({"a": Adds(1.0), "b": Adds(10.0)})
    assert torch.allclose(merger(torch.zeros(1, 3), torch.zeros(1, 3)), torch.full((1, 3), 11.0))
    merger.bias.fill_(100.0)
    assert torch.allclose(merger(torch.zeros(1, 3), torch.zeros(1, 3)), torch.full((1, 3), 22.0))


class Adds(torch.nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.amount


def test_what_cannot_be_fused(files: dict[str, Path]) -> None:
    fusion, dit = load_fusion(files["fusion"]), tiny_run.random_dit()
    with pytest.raises(ConfigError, match="no LoRAs to fuse"):
        fusion.attach([])
    with pytest.raises(ConfigError, match=rf"(?s)only LoRAs that add.*LoRA 1 of 1 is ia3 at dit\.{LACKED}"):
        fusion.attach([scales(dit)])
    other = LoraFusion({name: merger.bias.numel() + 1 for name, merger in fusion.model_dict.items()})  # type: ignore[operator, union-attr]  # Mergers
    _, loras = loaded(files, "a")
    with pytest.raises(ModelFileError, match="another size"):
        other.attach(loras)
    with pytest.raises(ModelFileError, match="lora_fusion was expected"):
        load_fusion(files["a"])


@pytest.mark.ledger("DS-19")
def test_pictures(files: dict[str, Path]) -> None:
    """A fused picture is another than the sum; LoRAs loaded later join; without LoRAs nothing is left."""
    pipeline = load(files["model"])
    base = latents(pipeline)
    pipeline.load_lora(files["a"], 0.7)
    pipeline.load_lora(files["b"], 0.5)
    summed = latents(pipeline)
    pipeline.fuse_loras(files["fusion"])
    fused = latents(pipeline)
    assert (fused - summed).abs().max() > 1e-3
    early = load(files["model"])
    early.load_lora(files["a"], 0.7)
    early.fuse_loras(files["fusion"])
    early.load_lora(files["b"], 0.5)
    assert torch.equal(latents(early), fused)
    with pytest.raises(ConfigError, match="only LoRAs that add"):
        pipeline.add_lora(scales(pipeline.models.dit))  # type: ignore[arg-type]  # it is loaded
    assert torch.equal(latents(pipeline), fused)  # as if it had not been tried
    pipeline.clear_loras()
    assert torch.equal(latents(pipeline), base)


def scales(dit: FluxDiT) -> AdapterSet:
    """An (IA)3 of one layer, attached."""
    part = Part("", 0, tiny_run.HIDDEN, "ia3", {"weight": torch.ones(tiny_run.HIDDEN, 1), "on_input": torch.tensor(False)}, 1.0)
    path = f"dit.{LACKED}"
    made = from_state(AdapterState({path: LayerState((part,), tiny_run.HIDDEN)}), {path: block_layers(dit)[LACKED]}, name="scales")
    made.attach()
    return made


def test_the_published_file_builds(manifests_root: Path) -> None:
    shapes = {
        name: tuple(shape) for name, shape in json.loads((manifests_root / "lora-fusion-patcher.json").read_text())["tensors"].items()
    }
    made = meta(lambda: fusion_of(shapes))
    assert shapes_of(made) == shapes
    assert len(made.paths) == 304


def test_its_file_is_known(files: dict[str, Path]) -> None:
    assert identify(files["fusion"]).role == "lora_fusion"


@pytest.mark.ledger("DS-19")
def test_the_command_fuses_and_says_so(files: dict[str, Path], tmp_path: Path) -> None:
    loras = tuple((str(files[name]), 1.0) for name in ("a", "b"))
    settings = {"width": 32, "height": 32, "steps": 1}
    job = Job(load_model({"model": model_section(files["model"])}), ("x",), (0,), settings, loras=loras, place={"device": "cpu"})
    (plain,) = draw_all(replace(job, out=tmp_path / "plain.png"))
    (fused,) = draw_all(replace(job, fusion=str(files["fusion"]), out=tmp_path / "fused.png"))
    assert fused["lora_fusion"] == str(files["fusion"])
    assert "lora_fusion" not in plain
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "fused.png").read_bytes()
    with pytest.raises(ConfigError, match="give more --lora"):
        list(draw_all(replace(job, loras=loras[:1], fusion=str(files["fusion"]), out=tmp_path / "one.png")))
