"""Adapter files of many makers on the tiny transformer and the tiny text encoders give the reference outputs."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fluxsmith.adapters.base import linear_layers
from fluxsmith.adapters.formats.files import read_adapter
from fluxsmith.adapters.load import delta_of, from_state, load_adapter
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.load import load_clip_l, load_dit, load_t5xxl
from fluxsmith.models.packing import image_ids, pack, text_ids, unpack
from fluxsmith.models.stream import Tokens

FIXTURE = "flux-dev-lora-tiny"
META = json.loads((Path(__file__).parents[1] / "fixtures" / FIXTURE / "meta.json").read_text())
FILES = {name.removesuffix(".safetensors"): entry["group"] for name, entry in META["files"].items()}
DORA = ["lycoris_dora", "lycoris_dora_in", "lycoris_dokr"]


@pytest.fixture(scope="module")
def base(fixtures_root: Path) -> FluxDiT:
    return load_dit(fixtures_root / "flux-dev-tiny/weights.safetensors", axes_dim=META["config"]["axes_dim"])


@pytest.fixture(scope="module")
def inputs(fixtures_root: Path) -> Tokens:
    t = load_file(fixtures_root / FIXTURE / "inputs.safetensors")
    return Tokens(t["img"], t["img_ids"], t["txt"], t["txt_ids"], t["y"], t["timesteps"], t["guidance"])


@pytest.fixture(scope="module")
def expected(fixtures_root: Path) -> dict[str, Tensor]:
    return load_file(fixtures_root / FIXTURE / "expected.safetensors")


def test_every_group_of_the_fixture_has_a_file(expected: dict[str, Tensor]) -> None:
    groups = {name.split("/")[0] for name in expected} - {"base"}
    assert groups == set(FILES.values())
    assert len(FILES) == 32


def tokens_for(name: str, inputs: Tokens, fixtures_root: Path) -> Tokens:
    """A control LoRA takes the control image's tokens as further channels."""
    if name != "bfl_control":
        return inputs
    control = load_file(fixtures_root / FIXTURE / "inputs.safetensors")["control_cond"]
    return inputs._replace(img=torch.cat((inputs.img, control), dim=-1))


@torch.no_grad()
@pytest.mark.ledger("KS-08")
@pytest.mark.ledger("ST-11")
@pytest.mark.ledger("ST-12")
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", FILES)
def test_outputs(name: str, strength: float, base: FluxDiT, inputs: Tokens, expected: dict[str, Tensor], fixtures_root: Path) -> None:
    dit = copy.deepcopy(base)
    adapters = load_adapter(fixtures_root / FIXTURE / f"{name}.safetensors", {"dit": dit}, strength=strength)
    target = expected[f"{FILES[name]}/scale_{strength}"]
    assert (dit(tokens_for(name, inputs, fixtures_root)) - target).abs().max() < META["tolerance"]["output"]
    assert (target - expected["base"]).abs().max() > 10 * META["tolerance"]["output"]  # the adapter does something
    adapters.detach()
    assert (dit(inputs) - expected["base"]).abs().max() < META["tolerance"]["output"]


@torch.no_grad()
@pytest.mark.parametrize("name", FILES)
def test_merged_equals_attached(name: str, base: FluxDiT, inputs: Tokens, expected: dict[str, Tensor], fixtures_root: Path) -> None:
    dit = copy.deepcopy(base)
    load_adapter(fixtures_root / FIXTURE / f"{name}.safetensors", {"dit": dit}, strength=0.6).merge()
    assert not any(".adapters." in key for key, _ in dit.named_parameters())
    out = dit(tokens_for(name, inputs, fixtures_root))
    assert (out - expected[f"{FILES[name]}/scale_0.6"]).abs().max() < META["tolerance"]["output"]


@torch.no_grad()
@pytest.mark.ledger("ST-12")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", DORA)
def test_interpolated_dora(
    name: str, merged: bool, base: FluxDiT, inputs: Tokens, expected: dict[str, Tensor], fixtures_root: Path
) -> None:
    """What ComfyUI makes of a strength, as an option."""
    dit = copy.deepcopy(base)
    path = fixtures_root / FIXTURE / f"{name}.safetensors"
    adapters = load_adapter(path, {"dit": dit}, strength=0.6, dora_rule="interpolated")
    if merged:
        adapters.merge()
    target = expected[f"{FILES[name]}/scale_0.6_interpolated"]
    assert (dit(inputs) - target).abs().max() < META["tolerance"]["output"]
    assert (target - expected[f"{FILES[name]}/scale_0.6"]).abs().max() > 10 * META["tolerance"]["output"]


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FILES if name != "bfl_control"])
def test_delta_without_a_model(name: str, base: FluxDiT, fixtures_root: Path) -> None:
    """What tools use gives the same as the attached adapters."""
    dit = copy.deepcopy(base)
    path = fixtures_root / FIXTURE / f"{name}.safetensors"
    adapters, layers = load_adapter(path, {"dit": dit}, strength=0.6), read_adapter(path).layers
    for layer_path, adapter in adapters.adapters.items():
        weight = adapters.bases[layer_path].weight
        assert torch.allclose(delta_of(layer_path, layers[layer_path], weight, strength=0.6), adapter.delta(weight), atol=1e-6)


TEXT = "text-encoder-lora-tiny"


@pytest.fixture(scope="module")
def encoders(fixtures_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    folder = tmp_path_factory.mktemp("clip")
    shutil.copy(fixtures_root / "clip_l-tiny/weights.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    return {
        "clip_l": load_clip_l(folder / "model.safetensors"),
        "t5xxl": load_t5xxl(fixtures_root / "t5-tiny/weights.safetensors"),
    }


@torch.no_grad()
@pytest.mark.ledger("KS-03")
@pytest.mark.ledger("KS-04")
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", ["kohya", "diffusers_clip_only"])
def test_text_encoders(name: str, strength: float, encoders: dict[str, nn.Module], fixtures_root: Path) -> None:
    folder = fixtures_root / TEXT
    ids, wanted = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    tolerance = json.loads((folder / "meta.json").read_text())["tolerance"]
    state = read_adapter(folder / f"{name}.safetensors")
    assert state.roles() == (("clip_l", "t5xxl") if name == "kohya" else ("clip_l",))
    adapters = from_state(state, linear_layers(encoders))
    adapters.scale(strength)
    adapters.attach()
    try:
        clip = encoders["clip_l"](ids["clip_input_ids"])
        assert (clip - wanted[f"clip/scale_{strength}/pooled"]).abs().max() < tolerance["clip"]
        if name == "kohya":
            t5 = encoders["t5xxl"](ids["t5_input_ids"])
            assert (t5 - wanted[f"t5/scale_{strength}/last_hidden_state"]).abs().max() < tolerance["t5"]
    finally:
        adapters.detach()


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", ["raw", "aligned"])
def test_diffsynth_files(name: str, strength: float, base: FluxDiT, fixtures_root: Path) -> None:
    """The raw training file, of which DiffSynth's own loader takes nothing, acts like the aligned one."""
    folder = fixtures_root / "diffsynth-lora-tiny"
    meta = json.loads((folder / "meta.json").read_text())
    t, wanted = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    dit = copy.deepcopy(base)
    load_adapter(folder / f"{name}.safetensors", {"dit": dit}, strength=strength)
    latents = t["latents"]
    tokens = Tokens(
        img=pack(latents),
        img_ids=image_ids(1, *latents.shape[-2:], device=latents.device),
        txt=t["txt"][:1],
        txt_ids=text_ids(1, t["txt"].shape[1], device=latents.device),
        y=t["y"][:1],
        t=t["timesteps"] / 1000 if t["timesteps"].max() > 1 else t["timesteps"],
        guidance=t["guidance"],
    )
    out = unpack(dit(tokens), *latents.shape[-2:])
    assert (out - wanted[f"output/scale_{strength}"]).abs().max() < meta["tolerance"]["output"]
