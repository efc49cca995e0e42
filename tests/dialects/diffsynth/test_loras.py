"""LoRAs on the pipeline: hot and fused, cleared, in DiffSynth-Studio's own names, and never silently without effect."""

import gc
import logging
from pathlib import Path

import pytest
import torch
from diffsynth_tiny import SHORT, configs, load
from PIL import Image

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.lora import Config
from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig, load_state_dict
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.safetensors import save_weights


@pytest.fixture(scope="module")
def lora(loaded: FluxImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As DiffSynth-Studio's training writes it without --align_to_opensource_format."""
    return write(loaded, tmp_path_factory.mktemp("loras") / "epoch-4.safetensors", "diffsynth", seed=1)


def write(pipe: FluxImagePipeline, path: Path, style: str, *, seed: int, targets: str = "all") -> Path:
    adapters = Config.model_validate({"type": "lora", "rank": 2}).build(pipe.native.models.loaded(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    values = {key: torch.randn(param.shape, generator=generator) * 0.4 for key, param in adapters.params.items()}
    write_adapter(path, adapters.state(values), format=style, dtype=torch.float32)  # type: ignore[arg-type]  # a name of the table
    adapters.detach()
    return path


def drawn(pipe: FluxImagePipeline) -> bytes:
    return pipe("a star", **SHORT).tobytes()


def difference(one: bytes, other: bytes) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.ledger("DS-24")
def test_hot_loras_are_taken_off_again(pipe: FluxImagePipeline, lora: Path) -> None:
    plain = drawn(pipe)
    assert "lora_A.default.weight" in next(iter(load_state_dict(str(lora))))
    pipe.load_lora(pipe.dit, str(lora), hotload=True)
    once = drawn(pipe)
    assert difference(once, plain) > 2
    pipe.load_lora(pipe.dit, ModelConfig(path=lora), alpha=-1, hotload=True)
    assert difference(drawn(pipe), plain) <= 1  # the second undoes the first
    pipe.clear_lora()
    assert drawn(pipe) == plain
    pipe.load_loras(pipe.dit, [str(lora), lora], alpha=0.5, hotload=True)
    assert difference(drawn(pipe), once) <= 1
    pipe.clear_lora()
    pipe.load_lora(pipe.dit, state_dict=load_state_dict(str(lora)), hotload=True)
    assert drawn(pipe) == once


@pytest.mark.ledger("DS-24")
def test_fused_loras_stay(models_root: Path, pipe: FluxImagePipeline, lora: Path) -> None:
    other = load(models_root)
    other.load_lora(other.dit, str(lora), alpha=1)
    pipe.load_lora(pipe.dit, str(lora), hotload=True)
    fused = drawn(other)
    assert difference(fused, drawn(pipe)) <= 1
    other.clear_lora()
    assert drawn(other) == fused
    assert other.dit is not None
    assert not any(".adapters." in name for name, _ in other.dit.named_parameters())


@pytest.mark.ledger("DS-24")
def test_nothing_is_silently_left_out(pipe: FluxImagePipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign = {"blocks.99.attn.a_to_qkv": (32, 96), "blocks.0.attn.a_to_qkv": (32, 96)}
    tensors = {}
    for name, (inside, outside) in foreign.items():
        tensors |= {f"{name}.lora_A.default.weight": torch.ones(2, inside), f"{name}.lora_B.default.weight": torch.ones(outside, 2)}
    save_weights(tmp_path / "deep.safetensors", tensors)
    with pytest.raises(ModelFileError, match=r"deep.safetensors.*no place: dit.double_blocks.99"):
        pipe.load_lora(pipe.dit, str(tmp_path / "deep.safetensors"), hotload=True)
    both = tmp_path / "both.safetensors"
    encoder = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.eye(2, 16) * 9}
    encoder |= {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(32, 2)}
    save_weights(both, encoder)
    with pytest.raises(ModelFileError, match="no layer of the dit.*its layers are of: clip_l"):
        pipe.load_lora(pipe.dit, both)
    dit = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 32)}
    dit |= {"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(32, 2)}
    save_weights(both, encoder | dit)
    with caplog.at_level(logging.WARNING):
        pipe.load_lora(pipe.dit, both, hotload=True)
    assert "1 layers of other networks are left out" in caplog.text
    only_dit = drawn(pipe)
    pipe.clear_lora()
    pipe.load_lora(pipe, both, hotload=True)
    assert drawn(pipe) != only_dit
    with pytest.raises(ConfigError, match=r"pass pipe\.dit"):
        pipe.load_lora(torch.nn.Linear(1, 1), both)
    with pytest.raises(ConfigError, match="has no LoRA"):
        pipe.load_lora(pipe.dit)
    with pytest.raises(ModelFileError, match="no such file"):
        pipe.load_lora(pipe.dit, "nowhere.safetensors")


@pytest.mark.ledger("DS-24")
def test_swapping_does_not_make_memory_grow(pipe: FluxImagePipeline, lora: Path) -> None:
    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        return len(tensors), sum(one.numel() for one in tensors if one.device.type != "meta")

    def swap() -> None:
        pipe.load_lora(pipe.dit, str(lora), hotload=True)
        pipe.clear_lora()

    swap()
    before = alive()
    for _ in range(3):
        swap()
    assert alive() == before


@pytest.mark.ledger("DS-07")
@pytest.mark.ledger("DS-24")
@pytest.mark.parametrize("limit", [0.0, None])
def test_hot_loras_come_and_go_while_memory_is_managed(models_root: Path, pipe: FluxImagePipeline, lora: Path, limit: float | None) -> None:
    plain = drawn(pipe)
    pipe.load_lora(pipe.dit, str(lora), hotload=True)
    expected = drawn(pipe)
    managed = dict.fromkeys(("offload_dtype", "onload_dtype", "preparing_dtype", "computation_dtype"), torch.float32)
    places = dict.fromkeys(("offload_device", "onload_device", "preparing_device", "computation_device"), "cpu")
    other = FluxImagePipeline.from_pretrained(
        torch.float32, "cpu", configs(models_root, **managed, **places), vram_limit=limit
    )  # fmt: skip
    assert other.vram_management_enabled
    for _ in range(2):
        assert difference(drawn(other), plain) <= 1
        other.load_lora(other.dit, str(lora))
        assert difference(drawn(other), expected) <= 1
        other.clear_lora()
    if limit == 0:
        with pytest.raises(ConfigError, match="hotload=True"):
            other.load_lora(other.dit, str(lora), hotload=False)
        assert difference(drawn(other), plain) <= 1


def test_weights_in_memory_take_the_place_of_the_models(models_root: Path, tmp_path: Path) -> None:
    pipe, folder = load(models_root), models_root / "black-forest-labs/FLUX.1-dev"
    assert pipe.dit is not None
    plain = drawn(pipe)
    weights = load_state_dict(str(folder / "flux1-dev.safetensors"), torch_dtype=torch.bfloat16)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    changed = {name: value * 1.5 for name, value in weights.items()}
    pipe.dit.load_state_dict(changed)
    assert next(pipe.dit.parameters()).dtype == torch.float32
    assert drawn(pipe) != plain
    pipe.dit.load_state_dict(
        {f"model.diffusion_model.{name}": value for name, value in load_state_dict(folder / "flux1-dev.safetensors").items()}
    )
    assert drawn(pipe) == plain
    with pytest.raises(ModelFileError, match="a FLUX transformer was expected"):
        pipe.dit.load_state_dict(load_state_dict(folder / "ae.safetensors"))


def test_pictures_are_pictures(pipe: FluxImagePipeline) -> None:
    assert isinstance(pipe("a star", **SHORT), Image.Image)
