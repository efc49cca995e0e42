"""Each part by a rule of its own: where it rests, how much of it may be on the device while it works; and the same numbers throughout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised import config_of
from torch import Tensor, nn

from fluxsmith.config.load import load_model
from fluxsmith.memory.components import Components, Rule, is_gone, let_go, size_of, waiting
from fluxsmith.memory.layer_stream import layers_of
from fluxsmith.models.assembly import Level, Models, velocity
from fluxsmith.models.files import locate
from fluxsmith.models.loading import LazyModels, Loading
from fluxsmith.quant.base import loading

CPU = torch.device("cpu")


@pytest.fixture
def lazy(tiny_section: dict[str, str]) -> Callable[..., LazyModels]:
    def make(how: Loading | None = None, **changes: Any) -> LazyModels:
        config = load_model({"model": {**tiny_section, **changes}})
        return LazyModels(locate(config), config, CPU, how)

    return make


@torch.no_grad()
def numbers(models: Models, components: Components | None = None) -> list[Tensor]:
    """Text states, a velocity, pixels: every part has worked, in turn, twice."""
    found = []
    for _ in range(2):
        if components is not None:
            components.on("clip_l", "t5xxl")
        text = models.encode_text(["a red circle"])
        if components is not None:
            components.on("dit")
        latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
        assert models.dit is not None
        assert models.ae is not None
        made = velocity(models.dit, latents, text, Level(torch.tensor([0.5]), torch.tensor([2.0])))
        if components is not None:
            components.on("ae")
        found += [text.txt, text.pooled, made, models.ae.decode(made)]
    return found


ROLES = ("dit", "clip_l", "t5xxl", "ae")
RULES = {
    "rests on disk": Rule(rest="disk"),
    "stays": Rule(rest="device"),
    "layer by layer": Rule(work="host"),
    "few weights": Rule(persistent=1),
}


@pytest.mark.ledger("DS-07")
@pytest.mark.parametrize("name", [*RULES, "mapped"])
def test_every_rule_gives_the_same_numbers(lazy: Callable[..., LazyModels], name: str, tmp_path: Path) -> None:
    plain = numbers(lazy().get(ROLES))
    rule = RULES.get(name) or Rule(work="disk", folder=tmp_path)
    parts = lazy()
    models = parts.get(ROLES)
    components = Components(models.loaded(), CPU, rules=dict.fromkeys(ROLES, rule), refill=parts.refill)
    assert all(torch.equal(one, other) for one, other in zip(numbers(models, components), plain, strict=True))
    stacked = {role for role in ROLES if role == "dit" or layers_of(models.part(role))}
    assert set(components.lanes) == (stacked if rule.streams() else set())
    gone = [role for role in ROLES if is_gone(models.part(role))]
    assert gone == (["dit", "clip_l", "t5xxl"] if rule.rest == "disk" else [])


@pytest.mark.ledger("DS-07")
def test_what_rests_on_disk_has_no_memory_and_comes_back_with_its_adapters(lazy: Callable[..., LazyModels]) -> None:
    parts = lazy()
    dit = parts.get(("dit",)).dit
    assert dit is not None
    layer = dit.get_submodule("double_blocks.0.img_attn.qkv")
    adapter = nn.Module()
    adapter.factor = nn.Parameter(torch.ones(3))
    layer.adapters["a"] = adapter  # type: ignore[index]  # a Linear's slot
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    components = Components({"dit": dit}, CPU, rules={"dit": Rule(rest="disk")}, refill=parts.refill)
    components.rest()
    assert size_of(dit) == 12, "the adapter's"
    components.on("dit")
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())
    assert layer.adapters["a"] is adapter  # type: ignore[index]  # as above
    assert not any(param.requires_grad for param in dit.parameters() if param is not adapter.factor)


@pytest.mark.ledger("DS-07")
@pytest.mark.ledger("ST-05")
def test_a_part_stored_in_fp8_and_computed_in_the_types_of_its_inputs_is_refilled_as_such(lazy: Callable[..., LazyModels]) -> None:
    config = config_of("fp8", text_encoders=True)
    how = loading(config, torch.float32, CPU)
    parts = lazy(how)
    models = parts.get(ROLES)
    plain = numbers(models)
    components = Components(models.loaded(), CPU, rules={role: Rule(rest="disk") for role in ("dit", "t5xxl")}, refill=parts.refill)
    assert all(torch.equal(one, other) for one, other in zip(numbers(models, components), plain, strict=True))
    models = lazy().get(("t5xxl",))
    let_go(models.part("t5xxl"))
    with pytest.raises(ValueError, match="was changed after it was loaded"):
        parts.refill("t5xxl", models.part("t5xxl"))


def test_how_many_layers_wait() -> None:
    module = nn.ModuleList(nn.Linear(9, 10) for _ in range(4))  # 100 weights each
    layers = [*module]
    assert waiting(module, layers, Rule()) == 0
    assert waiting(module, layers, Rule(work="host")) == 4
    assert [waiting(module, layers, Rule(persistent=count)) for count in (400, 399, 200, 99, 0)] == [0, 1, 2, 4, 4]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(work="disk"), "needs a folder"),
        (Rule(rest="disk", persistent=1), "rests on the host"),
        (Rule(rest="disk"), "a way to read"),
    ],
)
def test_rules_that_cannot_be_met(rule: Rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Components({"ae": nn.Linear(2, 2)}, CPU, rules={"ae": rule})


def test_text_encoders_have_types_of_their_own(lazy: Callable[..., LazyModels]) -> None:
    parts = lazy(text_dtype={"t5xxl": "bf16"})
    models = parts.get(("clip_l", "t5xxl"))
    types = {role: next(models.part(role).parameters()).dtype for role in ("clip_l", "t5xxl")}
    assert types == {"clip_l": torch.float32, "t5xxl": torch.bfloat16}
    digests = {lazy(text_dtype=kind).text_digest() for kind in ("fp32", "bf16", {"t5xxl": "bf16"}, {"clip_l": "bf16"})}
    assert len(digests) == 4, "states of other types are not taken from a cache"
    assert lazy(text_dtype={"t5xxl": "bf16", "clip_l": "bf16"}).text_digest() == lazy(text_dtype="bf16").text_digest()
    assert models.encode_text(["a red circle"]).txt.dtype == torch.bfloat16
