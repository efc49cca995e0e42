"""Merging gives what attaching gives, for every kind of adapter, base and layout, and says what does not fit."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import deltas_of, diffusers_folder, merged_by_hand, metadata_of, tensors_of
from torch import Tensor

from fluxsmith.adapters.formats.files import write_adapter
from fluxsmith.adapters.formats.state import AdapterState, LayerState, lora_part
from fluxsmith.adapters.load import load_adapter
from fluxsmith.adapters.targets import clip_layers, t5_layers
from fluxsmith.config.load import load_model
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.io.canonical import canonical
from fluxsmith.io.identify import identify
from fluxsmith.io.safetensors import open_weights, save_weights
from fluxsmith.io.scaled import ScaledFile
from fluxsmith.models.load import load_dit
from fluxsmith.models.stream import Tokens
from fluxsmith.tools.merge import MergeReport, MergeRequest, merge_into_model

META = json.loads((Path(__file__).parents[1] / "fixtures/flux-dev-lora-tiny/meta.json").read_text())
FILES = [name.removesuffix(".safetensors") for name in META["files"]]
AXES = META["config"]["axes_dim"]
MakeLora = Callable[..., Path]
LoraFile = Callable[[str], Path]


def merge(model: Path, target: Path, *adapters: tuple[Path, float], **options: Any) -> MergeReport:
    return merge_into_model(MergeRequest({"dit": model}, {"dit": target}, adapters, **options))


@pytest.fixture(scope="module")
def inputs(fixtures_root: Path) -> dict[str, Tensor]:
    return tensors_of(fixtures_root / "flux-dev-lora-tiny/inputs.safetensors")


@torch.no_grad()
def output(model: Path, t: dict[str, Tensor], *adapters: tuple[Path, float], control: bool = False) -> Tensor:
    dit = load_dit(model, axes_dim=AXES)
    for number, (file, strength) in enumerate(adapters):
        load_adapter(file, {"dit": dit}, strength=strength, name=f"a{number}")
    img = torch.cat((t["img"], t["control_cond"]), dim=-1) if control else t["img"]
    return dit(Tokens(img, t["img_ids"], t["txt"], t["txt_ids"], t["y"], t["timesteps"], t["guidance"]))


def farthest(a: Path, b: Path) -> float:
    """Largest difference between the tensors of two files, which have the same names."""
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def near(a: Tensor, b: Tensor) -> bool:
    """Within 1e-5 of the size of the values."""
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


# ---- equality with attaching ----------------------------------------------------------------------------------------


@pytest.mark.ledger("KS-47")
@pytest.mark.parametrize("name", FILES)
def test_every_kind_merges_as_it_attaches(base: Path, lora_file: LoraFile, inputs: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    for strength in (1.0, 0.6):
        target = tmp_path / f"{strength}.safetensors"
        report = merge(base, target, (lora_file(name), strength))
        control = name == "bfl_control"
        assert near(output(target, inputs, control=control), output(base, inputs, (lora_file(name), strength), control=control))
        assert report.skipped == ()
        assert next(iter(report.layers.values())) > 0


@pytest.mark.ledger("KS-47")
@pytest.mark.parametrize(
    "names",
    [
        ("kohya", "diffusers_peft"),
        ("lycoris_full_diff", "kohya"),
        ("kohya", "kohya_oft"),
        ("kohya", "lycoris_dora"),
        ("kohya_oft", "lycoris_glora"),
    ],
)
def test_several_adapters_as_attached_in_order(
    base: Path, lora_file: LoraFile, inputs: dict[str, Tensor], tmp_path: Path, names: tuple[str, str]
) -> None:
    """Also where the second looks at the weight (DoRA, OFT, GLoRA)."""
    both = [(lora_file(name), strength) for name, strength in zip(names, (0.7, 0.4), strict=True)]
    merge(base, tmp_path / "out.safetensors", *both)
    attached = output(base, inputs, *both)
    assert near(output(tmp_path / "out.safetensors", inputs), attached)
    assert not near(output(base, inputs, both[0]), attached)


@pytest.mark.ledger("KS-47")
def test_each_strength_counts_once(base: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    """W + 0.5 A - 0.25 B, to the rounding of fp32: no squares, no cross terms."""
    a, b = make_lora("a", seed=1, rank=3, alpha=2.0), make_lora("b", seed=2, rank=5, alpha=7.0)
    merge(base, tmp_path / "out.safetensors", (a, 0.5), (b, -0.25))
    expected = tensors_of(merged_by_hand(base, tmp_path / "hand.safetensors", {a: 0.5, b: -0.25}))
    made = tensors_of(tmp_path / "out.safetensors")
    assert made.keys() == expected.keys()
    assert max(float((made[name] - expected[name]).abs().max()) for name in made) < 1e-6
    untouched = [name for name in made if name.removesuffix(".weight") not in {path.removeprefix("dit.") for path in deltas_of(a)}]
    stored = tensors_of(base)
    assert all(torch.equal(made[name], stored[name]) for name in untouched)


def text_loras(section: dict[str, str], folder: Path) -> Path:
    """A LoRA for layers of all three models, with ai-toolkit's folded and sd-scripts' unfolded strengths in one state."""
    generator = torch.Generator().manual_seed(4)
    made = {}
    for role, names in (("dit", None), ("clip_l", clip_layers(1)), ("t5xxl", t5_layers(1))):
        with open_weights(section[{"dit": "path"}.get(role, role)]) as weights:
            paths = names or [
                f"dit.{n.removesuffix('.weight')}" for n in weights if "blocks" in n and n.endswith("weight") and "norm" not in n
            ]
            for path in paths:
                rows, inputs = weights.infos[f"{path.removeprefix(f'{role}.')}.weight"].shape
                down, up = torch.randn(2, inputs, generator=generator) * 0.1, torch.randn(rows, 2, generator=generator) * 0.1
                made[path] = LayerState((lora_part("", 0, rows, down, up, 3.0),), rows)
    write_adapter(folder / "all.safetensors", AdapterState(made), dtype=torch.float32)
    return folder / "all.safetensors"


@pytest.mark.ledger("KS-47")
def test_merge_then_generate_equals_attach_then_generate(tiny_section: dict[str, str], tmp_path: Path) -> None:
    """Transformer and both text encoders, through the sampler."""
    lora = text_loras(tiny_section, tmp_path)
    roles = {"dit": "path", "clip_l": "clip_l", "t5xxl": "t5xxl"}
    models = {role: tiny_section[key] for role, key in roles.items()}
    targets = {role: tmp_path / f"merged-{role}.safetensors" for role in roles}
    report = merge_into_model(MergeRequest(models, targets, ((lora, 0.8),)))
    assert report.layers == {str(lora): len(deltas_of(lora))}
    request = Request("a red circle", width=32, height=32, steps=4, seed=3)
    attached = Pipeline.load(load_model({"model": tiny_section}), device="cpu")
    before = attached.latents(attached.completed(request))
    attached.load_lora(lora, 0.8)
    folder = Path(tiny_section["clip_l"]).parent
    section = tiny_section | {key: str(targets[role]) for role, key in roles.items()}
    section |= {"tokenizer": str(folder / "tokenizer"), "tokenizer_2": str(folder / "tokenizer_2")}
    merged = Pipeline.load(load_model({"model": section}), device="cpu")
    with torch.no_grad():
        expected, made = attached.latents(attached.completed(request)), merged.latents(merged.completed(request))
    assert float((made - expected).abs().max()) < 1e-5
    assert float((expected - before).abs().max()) > 1e-2


# ---- bases, types, layouts ------------------------------------------------------------------------------------------


@pytest.mark.ledger("KS-47")
@pytest.mark.parametrize("layout", ["bfl", "same"])
def test_diffusers_folders(base: Path, make_lora: MakeLora, tmp_path: Path, layout: str) -> None:
    lora, folder = (
        make_lora("a", seed=1, layers=("single_blocks.1.linear1", "final_layer.adaLN_modulation.1")),
        diffusers_folder(base, tmp_path / "model"),
    )
    merge(folder, tmp_path / "out.safetensors", (lora, 0.5), layout=layout)
    expected = merged_by_hand(base, tmp_path / "hand.safetensors", {lora: 0.5})
    assert identify(tmp_path / "out.safetensors").key_style == ("bfl" if layout == "bfl" else "diffusers")
    made = {key: source.read() for key, source in canonical_of(tmp_path / "out.safetensors").items()}
    assert made.keys() == tensors_of(expected).keys()
    assert max(float((made[key] - value).abs().max()) for key, value in tensors_of(expected).items()) < 1e-6
    if layout == "same":
        with open_weights(folder / "transformer") as weights:
            assert {key: info.shape for key, info in weights.infos.items()} == {
                key: value.shape for key, value in tensors_of(tmp_path / "out.safetensors").items()
            }


def canonical_of(path: Path) -> dict[str, Any]:
    weights = open_weights(path)
    return canonical(weights, identify(weights), "dit")


@pytest.mark.ledger("KS-47")
def test_all_in_one_keeps_everything(base: Path, fixtures_root: Path, lora_file: LoraFile, tmp_path: Path) -> None:
    """`same`: adapters for the text encoder go in too, the autoencoder stays as it was, to the bit."""
    parts = {
        "model.diffusion_model.": base,
        "vae.": fixtures_root / "ae-tiny/weights.safetensors",
        "text_encoders.clip_l.transformer.": fixtures_root / "clip_l-tiny/weights.safetensors",
    }
    tensors = {prefix + name: value.half() for prefix, path in parts.items() for name, value in tensors_of(path).items()}
    save_weights(tmp_path / "aio.safetensors", tensors, {})
    loras = ((lora_file("kohya"), 0.5), (fixtures_root / "text-encoder-lora-tiny/diffusers_clip_only.safetensors", 0.5))
    report = merge(tmp_path / "aio.safetensors", tmp_path / "out.safetensors", *loras, layout="same")
    assert list(report.layers.values()) == [29, 18]
    made = tensors_of(tmp_path / "out.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in made.items()} == {
        name: (value.shape, value.dtype) for name, value in tensors.items()
    }
    changed = {name for name in made if not torch.equal(made[name], tensors[name])}
    assert not any(name.startswith("vae.") for name in changed)
    assert len(changed) == 29 + 18
    with pytest.raises(ModelFileError, match="18 of 47 layers .* have no place.*--clip-l"):
        merge(tmp_path / "aio.safetensors", tmp_path / "dit.safetensors", *loras)


@pytest.mark.ledger("KS-47")
@pytest.mark.parametrize(
    ("dtype", "weight", "vector"),
    [
        ("keep", torch.float32, torch.float32),
        ("fp16", torch.float16, torch.float16),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp8", torch.float8_e4m3fn, torch.bfloat16),
        ("fp8_e5m2", torch.float8_e5m2, torch.bfloat16),
    ],
)
def test_types(base: Path, lora_file: LoraFile, tmp_path: Path, dtype: str, weight: torch.dtype, vector: torch.dtype) -> None:
    report = merge(base, tmp_path / "out.safetensors", (lora_file("kohya"), 1.0), dtype=dtype)
    made, exact = (
        tensors_of(tmp_path / "out.safetensors"),
        tensors_of(merged_by_hand(base, tmp_path / "hand.safetensors", {lora_file("kohya"): 1.0})),
    )
    assert {value.dtype for value in made.values() if value.dim() == 2} == {weight}
    assert {value.dtype for value in made.values() if value.dim() == 1} == {vector}
    name = "single_blocks.0.linear1.weight"
    assert float((made[name].float() - exact[name]).abs().max()) <= float(exact[name].abs().max()) * {
        torch.float8_e5m2: 0.125,
        torch.float8_e4m3fn: 0.0625,
    }.get(weight, 0.005)
    assert any("8-bit" in note for note in report.notes) == (weight.itemsize == 1)
    load_dit(tmp_path / "out.safetensors", axes_dim=AXES)


@pytest.mark.ledger("KS-47")
def test_8_bit_bases(base: Path, lora_file: LoraFile, tmp_path: Path) -> None:
    """Computed from what is stored: a plain cast stays one, weights with scales become bf16, and 448 is not passed."""
    plain = {name: value.to(torch.float8_e4m3fn) if value.dim() == 2 else value for name, value in tensors_of(base).items()}
    save_weights(tmp_path / "plain.safetensors", plain, {})
    delta = deltas_of(lora_file("kohya"))["dit.single_blocks.0.linear1"]
    merge(tmp_path / "plain.safetensors", tmp_path / "a.safetensors", (lora_file("kohya"), 1.0))
    name = "single_blocks.0.linear1.weight"
    assert torch.equal(tensors_of(tmp_path / "a.safetensors")[name].float(), (plain[name].float() + delta).to(torch.float8_e4m3fn).float())
    merge(tmp_path / "plain.safetensors", tmp_path / "b.safetensors", (lora_file("kohya"), 1.0), dtype="fp32")
    assert torch.allclose(tensors_of(tmp_path / "b.safetensors")[name], plain[name].float() + delta, atol=1e-6)
    merge(tmp_path / "plain.safetensors", tmp_path / "c.safetensors", (lora_file("kohya"), 1e6), dtype="fp8")
    assert float(tensors_of(tmp_path / "c.safetensors")[name].float().abs().max()) == 448
    scaled = dict(plain) | {
        name: (plain[name].float() * 4).to(torch.float8_e4m3fn),
        "single_blocks.0.linear1.scale_weight": torch.tensor(0.25),
    }
    save_weights(tmp_path / "scaled.safetensors", scaled, {})
    report = merge(tmp_path / "scaled.safetensors", tmp_path / "d.safetensors", (lora_file("kohya"), 1.0))
    made = tensors_of(tmp_path / "d.safetensors")
    assert made[name].dtype == torch.bfloat16
    assert "single_blocks.0.linear1.scale_weight" not in made
    assert torch.allclose(made[name].float(), plain[name].float() + delta, rtol=1e-2, atol=1e-3)
    assert any("with scales" in note for note in report.notes)


@pytest.mark.parametrize("layout", ["bfl", "same"])
def test_streams(base: Path, make_lora: MakeLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Every stored tensor is read once, and only a few are alive at any time."""
    folder = diffusers_folder(base, tmp_path / "model")
    reads: dict[str, int] = {}
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    original = ScaledFile.tensor

    def tensor(self: ScaledFile, name: str, **options: Any) -> Tensor:
        nonlocal most
        made = original(self, name, **options)
        reads[name] = reads.get(name, 0) + 1
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(ScaledFile, "tensor", tensor)
    merge(folder, tmp_path / "out.safetensors", (make_lora("a", seed=1), 1.0), layout=layout)
    assert set(reads.values()) == {1}
    assert len(reads) > 100
    assert most <= 6


# ---- what is written beside the tensors ------------------------------------------------------------------------------


def test_metadata_says_where_it_comes_from(base: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    entries = {
        "modelspec.author": "somebody",
        "modelspec.title": "old",
        "modelspec.hash_sha256": "0x1",
        "fluxsmith.model": "{}",
        "modelspec.merged_from": "x",
    }
    save_weights(tmp_path / "base.safetensors", tensors_of(base), entries)
    merge(tmp_path / "base.safetensors", tmp_path / "out.safetensors", (make_lora("a", seed=1), 0.5), (make_lora("b", seed=2), 1.0))
    made = metadata_of(tmp_path / "out.safetensors")
    assert made["modelspec.merged_from"] == "x + base.safetensors + a.safetensors x 0.5 + b.safetensors x 1"
    assert (made["modelspec.author"], made["modelspec.title"], made["modelspec.architecture"]) == ("somebody", "out", "flux-1-dev")
    assert "modelspec.hash_sha256" not in made
    assert made["fluxsmith.model"] == "{}"
    merge(tmp_path / "base.safetensors", tmp_path / "bare.safetensors", (make_lora("a", seed=1), 0.5), has_metadata=False)
    assert metadata_of(tmp_path / "bare.safetensors") == {"fluxsmith.model": "{}"}


def test_a_bare_file_name_and_new_folders(base: Path, make_lora: MakeLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = make_lora("a", seed=1)
    monkeypatch.chdir(tmp_path)
    merge(base, Path("bare.safetensors"), (lora, 1.0))
    merge(base, Path("new/deep/out.safetensors"), (lora, 1.0))
    assert farthest(tmp_path / "bare.safetensors", tmp_path / "new/deep/out.safetensors") == 0


def test_a_base_can_be_written_over_when_asked(base: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    save_weights(own, tensors_of(base), {})
    with pytest.raises(ConfigError, match="add --overwrite"):
        merge(own, own, (make_lora("a", seed=1), 1.0))
    merge(own, own, (make_lora("a", seed=1), 1.0), overwrite=True)
    expected = tensors_of(merged_by_hand(base, tmp_path / "hand.safetensors", {tmp_path / "a.safetensors": 1.0}))
    assert max(float((value - expected[name]).abs().max()) for name, value in tensors_of(own).items()) < 1e-6


def test_dry_run_writes_nothing(base: Path, make_lora: MakeLora, tmp_path: Path) -> None:
    report = merge(base, tmp_path / "out.safetensors", (make_lora("a", seed=1), 1.0), is_dry_run=True)
    assert list(report.layers.values()) == [4]
    assert not (tmp_path / "out.safetensors").exists()


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_layers_without_a_place(base: Path, fixtures_root: Path, make_lora: MakeLora, lora_file: LoraFile, tmp_path: Path) -> None:
    text, out = fixtures_root / "text-encoder-lora-tiny/kohya.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(ModelFileError, match="39 of 39 layers.*give --clip-l FILE OUTPUT too"):
        merge(base, out, (text, 1.0))
    with pytest.raises(ModelFileError, match="give the models that the adapters are for"):
        merge(base, out, (text, 1.0), skips_unmatched=True)
    report = merge(base, out, (lora_file("kohya"), 1.0), (text, 1.0), skips_unmatched=True)
    assert len(report.skipped) == 39
    assert list(report.layers.values()) == [29, 0]
    with pytest.raises(ModelFileError, match="of another size"):
        merge(fixtures_root / "flux-dev-small/weights.safetensors", tmp_path / "x.safetensors", (lora_file("kohya"), 1.0))


def test_mistakes(base: Path, fixtures_root: Path, lora_file: LoraFile, tmp_path: Path) -> None:
    lora, out = lora_file("kohya"), tmp_path / "out.safetensors"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"models": {"dit": base}, "targets": {"dit": out}, "adapters": ()}, "no adapter is given"),
        ({"models": {}, "targets": {}, "adapters": ((lora, 1.0),)}, "no model .* is given"),
        ({"models": {"dit": base}, "targets": {}, "adapters": ((lora, 1.0),)}, "do not come together for dit"),
        ({"models": {"ae": base}, "targets": {"ae": out}, "adapters": ((lora, 1.0),)}, "ae is no model that takes adapters"),
        ({"models": {"dit": base}, "targets": {"dit": out}, "adapters": ((lora, 1.0),), "dtype": "int8"}, "no type 'int8'"),
    ]
    for settings, says in cases:
        with pytest.raises(ConfigError, match=says):
            merge_into_model(MergeRequest(**settings))
    with pytest.raises(ModelFileError, match="an adapter was expected"):
        merge(base, out, (base, 1.0))
    with pytest.raises(ModelFileError, match="no such file"):
        merge(base, out, (tmp_path / "nowhere.safetensors", 1.0))


def test_split_qkv_and_unknown_heights(base: Path, lora_file: LoraFile, tmp_path: Path) -> None:
    """XLabs files do not say how high linear1 is: the base does."""
    merge(base, tmp_path / "out.safetensors", (lora_file("xlabs"), 1.0))
    hand = merged_by_hand(base, tmp_path / "hand.safetensors", {lora_file("xlabs"): 1.0})
    assert (
        max(float((value - tensors_of(hand)[name]).abs().max()) for name, value in tensors_of(tmp_path / "out.safetensors").items()) < 1e-6
    )
