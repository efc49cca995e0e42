"""Which layers a preset, a pattern or a block list hits: counted on the full-size model's key list."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from fluxsmith.adapters.lora import Config
from fluxsmith.adapters.targets import PRESETS, Layer, Target, block_numbers, clip_layers, select, t5_layers
from fluxsmith.errors import ConfigError


@pytest.fixture(scope="module")
def full(manifests_root: Path) -> list[Layer]:
    """All linear layers of FLUX.1-dev, and those of its text encoders that can be adapted."""
    return [*dit_layers(manifests_root / "flux1-dev.json"), *text_layers(manifests_root)]


def dit_layers(path: Path) -> Iterator[Layer]:
    for key, shape in json.loads(path.read_text())["tensors"].items():
        if key.endswith(".weight") and len(shape) == 2:
            yield Layer(f"dit.{key.removesuffix('.weight')}", shape[1], shape[0])


def text_layers(manifests_root: Path) -> Iterator[Layer]:
    for role, file, names in (("clip_l", "clip_l", clip_layers(12)), ("t5xxl", "t5xxl", t5_layers(24))):
        shapes = json.loads((manifests_root / f"{file}.json").read_text())["tensors"]
        for path in names:
            out, width = shapes[path.removeprefix(f"{role}.") + ".weight"]
            yield Layer(path, width, out)


def parameters(targets: list[Target]) -> int:
    return sum(t.rank * (t.layer.in_features + t.rows[1] - t.rows[0]) for t in targets)


@pytest.mark.ledger("KS-08")
def test_all_is_what_sd_scripts_trains(full: list[Layer]) -> None:
    targets = select(Config(rank=1), full)
    assert len(targets) == 304
    assert sum("double_blocks" in t.name for t in targets) == 190
    assert parameters(targets) == 4_786_176


@pytest.mark.parametrize(
    ("preset", "count", "size"),
    [
        ("blocks", 228, None),
        ("simpletuner:all", 266, 26_148_864),
        ("mmdit", 190, 18_677_760 - 19 * 16 * 6144 + 19 * 16 * 6144),
        ("context", 76, 7_471_104),
        ("context+ffs", 114, 16_809_984),
        ("all+ffs", 419, 65_422_336),
        ("all+ffs+embedder", 420, 65_472_512),
        ("ai-toolkit", 495, 85_967_872),
        ("tiny", 2, 589_824),
        ("nano", 1, 294_912),
        ("inputs", 8, None),
        ("attention", 114, None),
        ("mlp", 114, None),
    ],
)
def test_presets(full: list[Layer], preset: str, count: int, size: int | None) -> None:
    targets = select(Config(rank=16, targets=preset), full)
    assert len(targets) == count
    if size is not None:
        assert parameters(targets) == size


@pytest.mark.ledger("KS-03")
@pytest.mark.ledger("KS-04")
def test_text_encoders_are_added(full: list[Layer]) -> None:
    assert len(select(Config(text_encoders=("clip_l",)), full)) == 304 + 72
    both = select(Config(text_encoders=("clip_l", "t5xxl"), targets=r"single_blocks\.0\.linear2"), full)
    assert len(both) == 1 + 72 + 168


def test_split_gives_each_part_its_rows(full: list[Layer]) -> None:
    targets = {t.name: t for t in select(Config(split_qkv=True), full, split=True)}
    assert len(targets) == 304 + 2 * 38 + 3 * 38
    assert targets["dit.double_blocks.0.img_attn.qkv:v"].rows == (6144, 9216)
    assert targets["dit.single_blocks.0.linear1:mlp"].rows == (9216, 21504)


def test_ranks_and_alphas(full: list[Layer]) -> None:
    config = Config(
        rank=8,
        alpha=4,
        rank_by_type={"img_attn": 2, "txt_mlp": 0},
        rank_by_pattern={r"double_blocks\.0\.": 32, r"img_attn\.proj": 5, "linear2": 0},
        alpha_by_pattern={"img_mod": 1},
    )
    targets = {t.name.removeprefix("dit."): t for t in select(config, full)}
    assert targets["double_blocks.1.img_attn.qkv"].rank == 2
    assert targets["double_blocks.0.img_attn.qkv"].rank == 32
    assert targets["double_blocks.0.img_attn.proj"].rank == 5  # the last match wins
    assert targets["double_blocks.0.txt_mlp.0"].rank == 32  # a pattern wins over the type
    assert "double_blocks.1.txt_mlp.0" not in targets
    assert not any("linear2" in name for name in targets)
    assert targets["double_blocks.1.img_attn.qkv"].alpha == 4
    assert targets["double_blocks.1.img_mod.lin"].alpha == 1
    assert next(iter(select(Config(rank=7), full))).alpha == 7


def test_learning_rates(full: list[Layer]) -> None:
    config = Config(
        dit_lr=1e-3, clip_l_lr=2e-3, text_encoders=("clip_l", "t5xxl"), lr_by_pattern={"single": 3e-3, r"single_blocks\.1\.": 0.0}
    )
    rates = {t.name: t.lr for t in select(config, full)}
    assert rates["dit.double_blocks.0.img_attn.qkv"] == 1e-3
    assert rates["dit.single_blocks.0.linear1"] == 3e-3
    assert rates["dit.single_blocks.1.linear1"] == 0
    assert rates[clip_layers(1)[0]] == 2e-3
    assert rates[t5_layers(1)[0]] is None


def test_blocks_and_exclusions(full: list[Layer]) -> None:
    names = {t.name for t in select(Config(double_blocks="0,3-5", single_blocks="none", exclude=("_mod", "txt")), full)}
    assert {name.split(".")[2] for name in names} == {"0", "3", "4", "5"}
    assert len(names) == 4 * 4
    assert block_numbers("all") is None
    with pytest.raises(ConfigError, match=r"double_blocks: the model has no block 19.*use 0 to 18"):
        select(Config(double_blocks="17-19"), full)


def test_what_hits_nothing_is_refused(full: list[Layer]) -> None:
    with pytest.raises(ConfigError, match="hits no layer"):
        select(Config(targets="unet_blocks"), full)
    with pytest.raises(ConfigError, match="neither a preset nor a pattern"):
        select(Config(targets="all+ff("), full)
    with pytest.raises(ConfigError, match="no layer to train"):
        select(Config(exclude=(".",)), full)


def test_config_is_checked() -> None:
    for wrong in ({"exclude": ("(",)}, {"rank_by_pattern": {"[": 1}}, {"double_blocks": "1-"}, {"rank": 0}):
        with pytest.raises(ValidationError):
            Config(**wrong)


def test_every_preset_is_documented() -> None:
    text = Config.model_fields["targets"].description or ""
    for name in PRESETS:
        assert f"`{name}`" in text or name.startswith("simpletuner:") or name in ("everything", "all+ffs+embedder")


def test_config_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from fluxsmith.config.choice import config_class;"
        "c = config_class('fluxsmith.adapters', 'lora')(rank=4, targets='all+ffs'); assert c.rank == 4;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
