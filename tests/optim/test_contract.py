"""Every optimizer by every name: groups with rates of their own, both weight types, a lower loss, and a state that goes on bit for bit."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fluxsmith.config.choice import config_class, plugin_names, realise
from fluxsmith.config.optimizer import OptimizerConfig, OptionsConfig
from fluxsmith.errors import ConfigError
from fluxsmith.io.safetensors import open_weights, save_weights
from fluxsmith.optim import dadapt, optimi, prodigy_plus, pytorch_optimizer, schedulefree
from fluxsmith.optim.groups import Group
from fluxsmith.optim.packages import package_class
from fluxsmith.train.checkpoint import join_optimizer, split_optimizer

FOLDER = "fluxsmith.optim"
SHAPES = {"dit.a.weight": (72, 64), "dit.a.bias": (72,), "dit.b.weight": (64, 72), "clip_l.c.weight": (4, 3, 3, 3)}
SHARED = ("dadapt", "prodigy", "prodigy_plus", "schedulefree", "pytorch_optimizer", "imported")  # tensors or groups depend on each other
NEEDS: dict[str, dict[str, Any]] = {"imported": {"path": "torch.optim.AdamW"}}
# What brings the loss down in 60 steps, where the rate of the others (0.03) does not.
RATES = {
    "rprop": 0.03,
    "adadelta": 5.0,
    "prodigy": 1.0,
    "prodigy_plus": 1.0,
    "dadapt": 1.0,
    "sgd": 0.3,
    "sgd8bit": 0.3,
    "tiger": 0.01,
    "asgd": 3.0,
    "lion": 0.01,
}
FASTER: dict[tuple[str, str], dict[str, Any]] = {
    ("prodigy", ""): {"d0": 1e-3},
    ("prodigy_plus", ""): {"d0": 1e-2},
    **{("dadapt", name): {"d0": 1e-2} for name in dadapt.CLASSES},
    ("dadapt", "lion"): {"d0": 0.1},
    ("schedulefree", "radam"): {"silent_sgd_phase": False},
}


def cases() -> list[dict[str, Any]]:
    found = []
    for kind in plugin_names(FOLDER):
        fields = config_class(FOLDER, kind).model_fields
        names = get_args(fields["name"].annotation) if "name" in fields else ("",)
        found += [{"type": kind, **NEEDS.get(kind, {}), **({"name": name} if name else {})} for name in names]
    found += [{"type": "schedulefree", "name": "wrapper", "base": base} for base in ("sgd", "rmsprop")]
    found += [
        {"type": "adafactor", "options": {"relative_step": True, "scale_parameter": True}},
        {"type": "adafactor", "options": {"relative_step": True, "warmup_init": True}},
        {"type": "adafactor", "options": {"beta1": 0.9}, "weight_decay": 0.1},
        {"type": "bnb", "name": "sgd8bit", "options": {"nesterov": True}},
        {"type": "prodigy", "options": {"slice_p": 7, "safeguard_warmup": True, "use_bias_correction": True}},
        {"type": "torch", "name": "sgd", "options": {"momentum": 0.9, "nesterov": True}},
        {"type": "pytorch_optimizer", "name": "soap", "options": {"precondition_frequency": 2}},
    ]
    return found


CASES = cases()


def title(values: Mapping[str, Any]) -> str:
    options = [f"{key}={value}" for key, value in values.get("options", {}).items()]
    return "-".join([*(str(value) for key, value in values.items() if key != "options"), *options])


def config_of(values: Mapping[str, Any], **changes: Any) -> Any:
    return realise(config_class(FOLDER, values["type"]).model_validate({**values, **changes}))


def params_of(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def build(config: Any, params: Mapping[str, nn.Parameter]) -> Any:
    """Two groups; the second has twice the rate where that is possible."""
    first = tuple(param for name, param in params.items() if name.startswith("dit."))
    second = tuple(param for name, param in params.items() if not name.startswith("dit."))
    return config.build([Group("dit", first), Group("clip_l", second, lr_factor=1.0 if config.has_one_rate() else 2.0)])


def steps(params: Mapping[str, nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        torch.manual_seed(step)  # stochastic rounding
        optimizer.step()


@pytest.mark.ledger("KS-09")
@pytest.mark.ledger("ST-13")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("values", CASES, ids=title)
class TestContract:
    def test_goes_on_bit_for_bit(self, values: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
        config = config_of(values, lr=0.1)
        straight, cut = params_of(dtype), params_of(dtype)
        whole, part = build(config, straight), build(config, cut)
        steps(straight, whole, 0, 6)
        steps(cut, part, 0, 3)
        tensors, numbers = split_optimizer(cut, part)
        save_weights(tmp_path / "optimizer.safetensors", tensors, {})
        numbers = json.loads(json.dumps(numbers))
        resumed = {name: nn.Parameter(param.detach().clone()) for name, param in cut.items()}
        again = build(config, resumed)
        with open_weights(tmp_path / "optimizer.safetensors") as stored:
            join_optimizer(resumed, again, {key: stored.tensor(key) for key in stored}, numbers)
        steps(resumed, again, 3, 6)
        for name, param in resumed.items():
            assert torch.equal(param, straight[name]), name
        (one, plain), (other, expected) = split_optimizer(resumed, again), split_optimizer(straight, whole)
        assert plain == expected
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)

    def test_groups_have_their_rates(self, values: dict[str, Any], dtype: torch.dtype) -> None:
        config = config_of(values, lr=0.1)
        optimizer = build(config, params_of(dtype))
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        expected = {"dit": 0.1, "clip_l": 0.1 if config.has_one_rate() else 0.2}
        assert rates == (expected if config.uses_schedule() else dict.fromkeys(expected))
        assert isinstance(config, OptimizerConfig)
        assert config.is_per_tensor() is (values["type"] not in SHARED)

    def test_lowers_the_loss(self, values: dict[str, Any], dtype: torch.dtype) -> None:
        name = values.get("name", "")
        key = (values["type"], name)
        if key == ("adafactor", "") and values.get("options", {}).get("warmup_init"):
            pytest.skip("its rate begins at 1e-6")
        options = {**values.get("options", {}), **FASTER.get(key, {})}
        lr = RATES.get(values.get("base", name.removeprefix("paged_")), RATES.get(values["type"], 0.03))
        config = config_of(values, lr=lr, weight_decay=0.0, **({"options": options} if options else {}))
        params, first, last = params_of(dtype), 0.0, 0.0
        optimizer = build(config, params)
        torch.manual_seed(0)
        for step in range(60):
            loss = sum(((param.float() - 0.3) ** 2).mean() for param in params.values())
            assert isinstance(loss, torch.Tensor)
            first, last = (loss.item() if step == 0 else first), loss.item()
            for param in params.values():
                param.grad = None
            loss.backward()
            optimizer.step()
        assert last < 0.995 * first, (first, last)

    def test_switches_between_two_sets_of_weights_and_back(self, values: dict[str, Any], dtype: torch.dtype) -> None:
        params = params_of(dtype)
        quicker = FASTER.get((values["type"], values.get("name", "")), values.get("options"))
        optimizer = build(config_of(values, lr=0.1, **({"options": quicker} if quicker else {})), params)
        steps(params, optimizer, 0, 8)
        has_two = values["type"] in ("schedulefree", "prodigy_plus")
        assert callable(getattr(optimizer, "eval", None)) is has_two
        if has_two:
            trained = {name: param.detach().clone() for name, param in params.items()}
            optimizer.eval()
            assert not torch.equal(params["dit.a.weight"], trained["dit.a.weight"])
            optimizer.train()
            for name, param in params.items():
                torch.testing.assert_close(param.detach(), trained[name], rtol=2e-2, atol=2e-2)


PER_TENSOR = [values for values in CASES if values["type"] not in SHARED]


@pytest.mark.ledger("KS-53")
@pytest.mark.parametrize("values", PER_TENSOR, ids=title)
def test_one_tensor_alone_is_updated_as_among_others(values: dict[str, Any]) -> None:
    """What `is_per_tensor` promises."""
    config = config_of(values, lr=0.1)
    together = params_of(torch.float32)
    steps(together, build(config, together), 0, 4)
    for name in SHAPES:
        alone = params_of(torch.float32)
        optimizer = build(config, alone)
        for step in range(4):
            generator = torch.Generator().manual_seed(100 + step)
            for key, param in alone.items():
                gradient = torch.randn(param.shape, generator=generator)
                param.grad = gradient if key == name else None
            optimizer.step()
        torch.testing.assert_close(alone[name], together[name], rtol=0, atol=1e-6)


WITH_OPTIONS = [kind for kind in plugin_names(FOLDER) if issubclass(config_class(FOLDER, kind), OptionsConfig) and kind != "imported"]


@pytest.mark.parametrize("kind", WITH_OPTIONS)
def test_a_misspelt_option_is_refused_at_once(kind: str) -> None:
    fields = config_class(FOLDER, kind).model_fields
    for name in get_args(fields["name"].annotation) if "name" in fields else ("",):
        values = {"type": kind, **({"name": name} if name else {})}
        known = config_of(values).option_names()
        with pytest.raises(ValidationError, match=f"has no option {known[0]}x: write {known[0]}"):
            config_of(values, options={f"{known[0]}x": 1})
        with pytest.raises(ValidationError, match=r"write optim\.lr"):
            config_of(values, options={"lr": 1})


PACKAGES = [("dadapt", dadapt.CLASSES, dadapt.OPTIONS)]
PACKAGES += [
    ("optimi", {name: ("optimi", kind) for name, kind in optimi.CLASSES.items()}, optimi.OPTIONS),
    ("prodigy_plus", {"": ("prodigyplus", "ProdigyPlusScheduleFree")}, {"": prodigy_plus.OPTIONS}),
    (
        "pytorch_optimizer",
        {name: ("pytorch_optimizer", kind) for name, kind in pytorch_optimizer.CLASSES.items()},
        pytorch_optimizer.OPTIONS,
    ),
    ("schedulefree", {name: ("schedulefree", kind) for name, kind in schedulefree.CLASSES.items()}, schedulefree.OPTIONS),
]


@pytest.mark.parametrize(("kind", "classes", "options"), PACKAGES, ids=[kind for kind, _, _ in PACKAGES])
def test_listed_options_exist(kind: str, classes: dict[str, tuple[str, str]], options: dict[str, tuple[str, ...]]) -> None:
    for name, place in classes.items():
        assert set(options[name]) <= set(inspect.signature(package_class(*place)).parameters), name


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(ConfigError, match=r"needs the package no_such_optimizers.*pip install 'fluxsmith\[optim\]'") as error:
        package_class("no_such_optimizers.optim", "Adam")
    assert "no_such_optimizers" in str(error.value)
    with pytest.raises(ConfigError, match="write torch.optim.AdamW"):
        package_class("torch.optim", "AdamWW")
