"""Every format writes what it read, conversions there and back are exact to the bit, what has no exact form is refused with the reason."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fluxsmith.adapters.formats.files import FORMATS, READERS, convert, read_adapter, with_heights, write_adapter
from fluxsmith.adapters.formats.state import AdapterState, LayerState, Part, lora_part
from fluxsmith.adapters.load import delta_of
from fluxsmith.errors import ModelFileError
from fluxsmith.io.identify import identify

WIDTH, MLP = 12, 48
QKV, LINEAR1 = "dit.double_blocks.0.img_attn.qkv", "dit.single_blocks.1.linear1"
PROJ, FINAL = "dit.double_blocks.0.img_attn.proj", "dit.final_layer.adaLN_modulation.1"
CLIP = "clip_l.text_model.encoder.layers.1.mlp.fc1"
T5 = "t5xxl.encoder.block.2.layer.0.SelfAttention.q"


def pair(name: str, start: int, stop: int, *, rank: int = 4, alpha: float = 4.0) -> Part:
    return lora_part(name, start, stop, torch.randn(rank, WIDTH), torch.randn(stop - start, rank), alpha)


def split(names: str, **options: float) -> tuple[Part, ...]:
    return tuple(pair(name, i * WIDTH, (i + 1) * WIDTH, **options) for i, name in enumerate(names))  # type: ignore[arg-type]


def loras(alpha: float = 4.0, *, text: bool = True) -> AdapterState:
    """Whole and split layers, the swapped layer, text encoders."""
    torch.manual_seed(3)
    layers = {
        QKV: LayerState((pair("", 0, 3 * WIDTH, alpha=alpha),), 3 * WIDTH),
        "dit.double_blocks.1.txt_attn.qkv": LayerState(split("qkv", alpha=alpha), 3 * WIDTH),
        LINEAR1: LayerState((*split("qkv", alpha=alpha), pair("mlp", 3 * WIDTH, 3 * WIDTH + MLP, alpha=alpha)), 3 * WIDTH + MLP),
        "dit.single_blocks.0.linear1": LayerState((pair("", 0, 3 * WIDTH + MLP, alpha=alpha),), 3 * WIDTH + MLP),
        PROJ: LayerState((pair("", 0, WIDTH, alpha=alpha),), WIDTH),
        FINAL: LayerState((pair("", 0, 2 * WIDTH, alpha=alpha),), 2 * WIDTH),
    }
    if text:
        layers |= {CLIP: LayerState((pair("", 0, MLP, alpha=alpha),), MLP), T5: LayerState((pair("", 0, WIDTH, alpha=alpha),), WIDTH)}
    return AdapterState(layers)


def through(state: AdapterState, *formats: str) -> AdapterState:
    for form in formats:
        state = FORMATS[form].read(*convert(state, form))
    return state


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) and tensor.dtype == b[name].dtype for name, tensor in a.items())


@pytest.mark.ledger("KS-08")
@pytest.mark.parametrize("there", ["comfy", "onetrainer", "lycoris", "peft", "ai_toolkit", "bfl_peft", "diffsynth"])
@pytest.mark.parametrize("here", ["kohya", "comfy", "peft", "ai_toolkit"])
def test_there_and_back_is_exact(here: str, there: str) -> None:
    """With alpha = rank, as trainers whose files have no alpha set it; the text encoders go along where the format has names."""
    start, _ = convert(loras(text=there not in ("bfl_peft", "diffsynth")), here)
    state = FORMATS[here].read(start, {})
    back, _ = convert(through(state, there), here)
    assert same(back, start)


@pytest.mark.parametrize("there", ["comfy", "onetrainer", "lycoris"])
def test_formats_with_alpha_keep_any_strength(there: str) -> None:
    start, _ = convert(loras(alpha=2.5), "kohya")
    back, _ = convert(through(FORMATS["kohya"].read(start, {}), there), "kohya")
    assert same(back, start)


@pytest.mark.parametrize("there", ["peft", "ai_toolkit", "bfl_peft", "diffsynth"])
def test_formats_without_alpha_keep_the_effect(there: str) -> None:
    start = loras(alpha=2.5, text=False)
    after = through(start, there)
    for path, layer in start.layers.items():
        assert torch.allclose(after.layers[path].delta(), layer.delta(), atol=1e-5), path


def test_the_fixture_of_sd_scripts_converter_bit_by_bit(fixtures_root: Path) -> None:
    """sd-scripts' convert_flux_lora.py made this file from the other one."""
    folder = fixtures_root / "flux-dev-lora-tiny"
    ours, _ = convert(read_adapter(folder / "kohya.safetensors"), "ai_toolkit")
    theirs = load_file(folder / "ai_toolkit.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-6, atol=0), name


def test_stacked_factors_come_apart_with_their_ranks(fixtures_root: Path) -> None:
    """kohya_split_qkv holds three pairs of rank 3 in one of rank 9: diffusers' names get the three again, not nine shared."""
    state = read_adapter(fixtures_root / "flux-dev-lora-tiny/kohya_split_qkv.safetensors")
    tensors, _ = convert(state, "ai_toolkit")
    assert state.layers[QKV].rank == 9
    assert tensors["transformer.transformer_blocks.0.attn.to_k.lora_A.weight"].shape[0] == 3
    assert tensors["transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight"].shape[0] == 3


OWN = [  # files that our writer of the same format gives back tensor by tensor
    ("kohya", "kohya"), ("kohya_split_qkv", "kohya"), ("diffusers_peft", "peft"), ("ai_toolkit", "ai_toolkit"),
    ("comfy_bfl_down_up", "comfy"), ("onetrainer_lora_transformer", "onetrainer"),
    ("bfl_peft_base_model", "bfl_peft"), ("diffsynth", "diffsynth"), ("xlabs", "xlabs"),
    ("xlabs_double_only", "xlabs"), ("bfl_control", "bfl_control"), ("kohya_oft", "kohya"), ("peft_dora", "peft"),
    ("lycoris_prefix_diffusers_lokr", "lycoris"), ("ai_toolkit_lokr", "ai_toolkit"),
    *[(f"lycoris_{name}", "kohya") for name in (
        "lokr", "lokr_full", "lokr_both", "loha", "dora", "dora_in", "dokr", "ia3", "ia3_input", "full_diff", "glora", "diag_oft",
        "diag_oft_constraint_rescale", "boft",
    )],
]  # fmt: skip


@pytest.mark.parametrize(("name", "form"), OWN)
def test_each_format_writes_what_it_read(name: str, form: str, fixtures_root: Path) -> None:
    path = fixtures_root / f"flux-dev-lora-tiny/{name}.safetensors"
    tensors, _ = convert(read_adapter(path), form)
    theirs = load_file(path)
    assert tensors.keys() == theirs.keys()
    folds = name == "peft_dora"  # alpha 2 of rank 3 stands in its header, ours folds it into lora_B
    for key, tensor in theirs.items():
        scale = 2 / 3 if folds and "lora_B" in key else 1
        assert torch.allclose(tensors[key].float(), tensor.float() * scale, rtol=1e-6, atol=0), key
    assert folds or same(tensors, theirs)


@pytest.mark.parametrize("form", FORMATS)
def test_written_files_are_identified_and_known(form: str, tmp_path: Path) -> None:
    state = loras(text=False)
    if form == "xlabs":
        state = AdapterState({path: state.layers[path] for path in (QKV, PROJ)})
    if form == "bfl_control":
        layer = state.layers[PROJ]
        bias = layer.parts[0].having(tensors={**layer.parts[0].tensors, "bias": torch.randn(WIDTH)})
        state = AdapterState(
            {PROJ: LayerState((bias,), WIDTH)}, replaced={"dit.double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(4)}
        )
    write_adapter(tmp_path / "a.safetensors", state, format=form, dtype=None)  # type: ignore[arg-type]
    found = identify(tmp_path / "a.safetensors")
    assert found.role == "lora"
    expected = {"ai_toolkit": "peft", "comfy": "comfy_bfl"}.get(form, form)
    assert found.key_style == expected
    assert FORMATS[form].matches(list(load_file(tmp_path / "a.safetensors")))
    assert READERS[found.key_style]
    again = read_adapter(tmp_path / "a.safetensors")
    assert again.layers.keys() == state.layers.keys()
    assert again.replaced.keys() == state.replaced.keys()


def test_comfy_files_of_text_encoders_alone_are_adapters(tmp_path: Path) -> None:
    """Their names begin as those of an all-in-one checkpoint."""
    state = AdapterState({CLIP: loras().layers[CLIP]})
    write_adapter(tmp_path / "a.safetensors", state, format="comfy", dtype=None)
    assert identify(tmp_path / "a.safetensors").role == "lora"
    assert torch.equal(read_adapter(tmp_path / "a.safetensors").layers[CLIP].delta(), state.layers[CLIP].delta())


def test_xlabs_becomes_sd_scripts_with_the_base_models_heights(fixtures_root: Path) -> None:
    folder = fixtures_root / "flux-dev-lora-tiny"
    state = read_adapter(folder / "xlabs.safetensors")
    with pytest.raises(ModelFileError, match="size cannot be told from this file"):
        convert(state, "kohya")
    heights = {f"dit.single_blocks.{i}.linear1": 448 for i in range(3)}
    ours = FORMATS["kohya"].read(*convert(with_heights(state, heights), "kohya"))
    theirs = read_adapter(folder / "xlabs_as_kohya.safetensors")
    assert ours.layers.keys() == theirs.layers.keys()
    for path, layer in theirs.layers.items():
        assert torch.allclose(ours.layers[path].delta(), layer.delta(), atol=1e-6)
    assert same(convert(theirs, "xlabs")[0], load_file(folder / "xlabs.safetensors"))


def randoms(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def whole_qkv(kind: str, alpha: float, **tensors: Tensor) -> Part:
    return Part("", 0, 36, kind, tensors, alpha)


KINDS = {
    "loha": whole_qkv("loha", 1.0, **randoms(w1_a=(36, 2), w1_b=(2, 12), w2_a=(36, 2), w2_b=(2, 12))),
    "full": whole_qkv("full", 1.0, **randoms(diff=(36, 12), bias=(36,))),
    "ia3": whole_qkv("ia3", 1.0, weight=torch.randn(36), on_input=torch.tensor(0)),
    "lokr": whole_qkv("lokr", 1.0, **randoms(w1=(6, 3), w2=(6, 4))),
    "glora": whole_qkv("glora", 1.0, **randoms(a1=(12, 2), a2=(2, 12), b1=(36, 2), b2=(2, 12))),
    "diag_oft": whole_qkv("diag_oft", 0.0, blocks=torch.randn(9, 4, 4), rescale=torch.rand(36, 1)),
    "dora": lora_part("", 0, 36, torch.randn(2, 12), torch.randn(36, 2), 1.0).having(rule="lycoris"),
}
KINDS["dora"] = KINDS["dora"].having(tensors={**KINDS["dora"].tensors, "magnitude": torch.rand(36, 1) + 1})


@pytest.mark.parametrize("kind", KINDS)
def test_whole_layers_are_cut_for_diffusers_names_with_the_same_effect(kind: str) -> None:
    weight = torch.randn(36, 12)
    layer = LayerState((KINDS[kind],), 36, 12)
    cut = through(AdapterState({QKV: layer}), "lycoris").layers[QKV]
    assert torch.allclose(delta_of(QKV, cut, weight), delta_of(QKV, layer, weight), atol=1e-5)


def having(kind: str, **changes: Tensor) -> AdapterState:
    part = KINDS[kind]
    return AdapterState({QKV: LayerState((part.having(tensors={**part.tensors, **changes}),), 36, 12)})


def qkv(kind: str, name: str, start: int, **tensors: Tensor) -> Part:
    return Part(name, start, start + WIDTH, kind, tensors, 1.0)


OFT_PART = LayerState((qkv("oft", "q", 0, blocks=torch.randn(3, 4, 4)),), 36, 12)
LOKR_PARTS = LayerState(tuple(qkv("lokr", n, i * 12, **randoms(w1=(3, 3), w2=(4, 4))) for i, n in enumerate("qkv")), 36, 12)
REFUSED = [
    (having("lokr"), "peft", "holds LoRA and DoRA over LoRA only, dit.double_blocks.0.img_attn.qkv is lokr.*extract a LoRA"),
    (having("full"), "diffsynth", "is bias with full"),
    (having("lokr", w1=torch.randn(4, 3), w2=torch.randn(9, 4)), "lycoris", "blocks of 9 rows of this lokr go over the borders"),
    (having("dora", magnitude=torch.rand(1, 12)), "lycoris", "norms per input needs all rows"),
    (having("dora", magnitude=torch.rand(1, 12)), "peft", "norms per output only"),
    (having("dora"), "diffsynth", "plain LoRA only.*magnitude"),
    (AdapterState({QKV: LayerState((KINDS["diag_oft"].having(alpha=0.1),), 36, 12)}), "lycoris", "constraint of a Diag-OFT"),
    (AdapterState({QKV: OFT_PART}), "comfy", "only sd-scripts' format|no exact form"),
    (AdapterState({QKV: LOKR_PARTS}), "kohya", "separate lokr factors for q, k, v, which have no exact form as one layer"),
    (loras(), "diffsynth", "no names for text encoders"),
    (loras(text=False), "xlabs", "XLabs' format has no layer|MLP rows are adapted too"),
    (AdapterState({LINEAR1: loras().layers[LINEAR1]}), "xlabs", "its MLP rows are adapted too"),
    (AdapterState({}, replaced={"dit.single_blocks.0.norm.key_norm.scale": torch.ones(4)}), "kohya", "no place for whole parameters"),
    (loras(), "diffuser", "there is no adapter format 'diffuser'.*use one of kohya"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "form", "message"), REFUSED)
def test_what_has_no_exact_form_is_refused(state: AdapterState, form: str, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        convert(state, form)


@pytest.mark.parametrize("alpha", [-2.0, 0.0])
@pytest.mark.parametrize("form", list(FORMATS))
def test_negative_and_zero_strengths_are_written(form: str, alpha: float) -> None:
    state = AdapterState({PROJ: loras(alpha=alpha).layers[PROJ]})
    made = FORMATS[form].read(*convert(state, form)).layers[PROJ]
    assert torch.allclose(made.delta(), state.layers[PROJ].delta(), atol=1e-6)
