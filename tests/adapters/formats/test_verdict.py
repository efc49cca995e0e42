"""What loaders take of our files and of others', and that the claims about diffusers are true."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.formats.verdict import LOADERS, verdict, verdict_of
from fluxsmith.adapters.lora import Config

ALL = ("sd-scripts", "ComfyUI", "Forge", "diffusers")


@pytest.mark.ledger("KS-49")
@pytest.mark.parametrize(
    ("options", "form", "loads"),
    [
        ({}, "kohya", ALL),
        ({"split_qkv": True}, "kohya", ALL),
        ({"text_encoders": ("clip_l",)}, "kohya", ALL),
        ({"text_encoders": ("clip_l", "t5xxl")}, "kohya", ("sd-scripts", "ComfyUI")),
        ({"targets": "ai-toolkit"}, "kohya", ("ComfyUI", "Forge")),  # has the final layer
        ({"targets": ("blocks", "inputs")}, "kohya", ("sd-scripts", "ComfyUI", "Forge")),
        ({}, "peft", ("ComfyUI", "Forge", "diffusers")),
        ({"targets": "ai-toolkit"}, "peft", ("ComfyUI", "Forge", "diffusers")),
        ({"text_encoders": ("clip_l",)}, "peft", ("ComfyUI", "Forge", "diffusers")),
    ],
)
def test_own_files(models: dict[str, nn.Module], tmp_path: Path, options: dict, form: str, loads: tuple[str, ...]) -> None:
    made = Config(rank=2, **options).build(models)
    found = write_adapter(tmp_path / "a.safetensors", made.state(), format=form)  # type: ignore[arg-type]
    assert found.loads_in == loads
    assert set(found.lost) == set(ALL) - set(loads)
    assert found == verdict(tmp_path / "a.safetensors")


def test_lost_keys_are_counted(models: dict[str, nn.Module], tmp_path: Path) -> None:
    made = Config(rank=2, targets="nano", text_encoders=("t5xxl",), exclude=("layer.0",)).build(models)
    found = write_adapter(tmp_path / "a.safetensors", made.state())
    assert found.loads_in == ("sd-scripts", "ComfyUI")
    assert "diffusers would lose" in found.text
    assert all(key.startswith("lora_te3_") for key in found.lost["diffusers"])
    assert found.as_record()["loads_in"] == ["sd-scripts", "ComfyUI"]


@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("kohya", ALL),
        ("kohya_split_qkv", ALL),
        ("diffusers_peft", ("ComfyUI", "Forge", "diffusers")),
        ("ai_toolkit", ("ComfyUI", "Forge", "diffusers")),
        ("comfy_bfl_down_up", ("ComfyUI", "Forge", "diffusers")),
        ("comfy_bfl_peft", ("ComfyUI", "Forge")),
        ("onetrainer_lora_transformer", ("ComfyUI", "Forge")),
        ("bfl_peft_base_model", ()),
        ("diffsynth", ()),
        ("lycoris_lokr", ("ComfyUI", "Forge")),
        ("lycoris_loha", ("ComfyUI", "Forge")),
        ("lycoris_dora", ("ComfyUI", "Forge")),
        ("lycoris_prefix_diffusers_lokr", ("ComfyUI", "Forge")),
        ("ai_toolkit_lokr", ("ComfyUI", "Forge")),
        ("lycoris_dokr", ("ComfyUI", "Forge")),
        ("lycoris_full_diff", ("ComfyUI", "Forge")),
        ("lycoris_glora", ("ComfyUI", "Forge")),
        ("lycoris_diag_oft_constraint_rescale", ("ComfyUI", "Forge")),
        ("lycoris_boft", ("ComfyUI", "Forge")),
        ("lycoris_ia3", ()),
        ("peft_dora", ("diffusers",)),
        ("kohya_oft", ("sd-scripts",)),
        ("xlabs", ("diffusers",)),
        ("bfl_control", ("ComfyUI", "diffusers")),
    ],
)
def test_other_makers_files(fixtures_root: Path, name: str, loads: tuple[str, ...]) -> None:
    assert verdict(fixtures_root / f"flux-dev-lora-tiny/{name}.safetensors").loads_in == loads


def test_nothing_loads_nowhere() -> None:
    assert verdict_of([]).loads_in == ()
    assert verdict_of(["foo.weight"]).text.startswith("loads nowhere that is known; sd-scripts would lose 1 of")
    assert set(LOADERS) == set(ALL)


@pytest.mark.ledger("KS-49")
def test_diffusers_really_drops_or_refuses_what_the_verdict_says(models: dict[str, nn.Module], tmp_path: Path) -> None:
    """The grammar of the diffusers column against diffusers' own converter (single blocks left out: it knows one width only)."""
    from diffusers import FluxPipeline
    from safetensors.torch import load_file

    def converted(name: str, **options: object) -> set[str]:
        made = Config(rank=2, single_blocks="none", **options).build(models)
        made.detach()
        write_adapter(tmp_path / name, made.state(), dtype=torch.float32)
        kept, _ = FluxPipeline.lora_state_dict(load_file(tmp_path / name), return_alphas=True)
        return set(kept)

    plain = converted("plain.safetensors", targets="all")
    assert all(key.startswith("transformer.") for key in plain)
    assert verdict(tmp_path / "plain.safetensors").loads_in == ALL
    embedders = converted("inputs.safetensors", targets="inputs")
    assert embedders
    assert not any(key.startswith("transformer.") for key in embedders)  # and load_lora_weights takes `transformer.` only
    assert "diffusers" in verdict(tmp_path / "inputs.safetensors").lost
