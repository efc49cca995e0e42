"""Modulation look-ahead: the same bits as resident weights, adapters that stay live, no device memory, one sweep for many steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_dit import dit, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.config.choice import realise
from fluxsmith.config.load import load_config
from fluxsmith.memory.checkpoint import checkpoint_blocks
from fluxsmith.memory.modulation import Conditioning, LookAhead, announce, confirm
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.layers import Modulation
from fluxsmith.quant.fp8 import Fp8Linear

CPU = torch.device("cpu")
PLAIN = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}


def adapted(model: FluxDiT, targets: str, kind: str = "lora") -> AdapterSet:
    config = load_config({**PLAIN, "adapter": {"type": kind, "rank": 2, "targets": targets}}).config
    adapters = realise(config.adapter).build({"dit": model}, seed=0)
    for param in adapters.params.values():
        torch.nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(3))
    return adapters


def input_of(seed: float) -> Conditioning:
    given = tokens()
    return Conditioning(torch.tensor([seed]), given.guidance, given.y)


@pytest.mark.ledger("FS-04")
def test_rows_of_many_steps_come_from_one_sweep_and_are_the_same_bits() -> None:
    resident, ahead = dit(), dit()
    look = LookAhead(ahead, CPU)
    look.attach()
    levels = (0.9, 0.5, 0.2)
    look.sweep([input_of(level) for level in levels], name="steps")
    for level in levels:
        given = tokens()._replace(t=torch.tensor([level]))
        assert torch.equal(resident(given), ahead(given))
    assert (look.sweeps, look.missed) == (1, 0)


@pytest.mark.ledger("FS-04")
def test_the_weights_are_on_the_host_once() -> None:
    model = dit()
    own = sum(p.numel() for module in model.modules() if isinstance(module, Modulation) for p in module.parameters())
    look = LookAhead(model, CPU)
    assert own * 4 <= look.host_bytes < own * 4 + 256 * len(look.layers)
    assert all(p.device.type == "meta" for module in model.modules() if isinstance(module, Modulation) for p in module.parameters())
    look.attach()
    model(tokens())
    assert look.lane.slots == []  # what a sweep borrows it gives back


def test_an_input_that_nobody_announced_is_right_all_the_same() -> None:
    resident, ahead = dit(), dit()
    look = LookAhead(ahead, CPU)
    look.attach()
    look.sweep([input_of(0.1)], name="steps")
    assert torch.equal(resident(tokens()), ahead(tokens()))
    assert look.missed == 1
    assert look.knows(input_of(0.1))  # the announced table is still there


def gradients(model: FluxDiT, adapters: AdapterSet) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(tokens())
    output.square().mean().backward()
    return output.detach(), {name: param.grad for name, param in adapters.params.items() if param.grad is not None}


@pytest.mark.ledger("FS-04")
@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_additive_adapters_on_the_layers_stay_live(kind: str, recomputes: bool) -> None:
    results = []
    for make in (lambda model: None, lambda model: LookAhead(model, CPU).attach()):
        model = dit()
        adapters = adapted(model, "all", kind)
        make(model)
        if recomputes:
            checkpoint_blocks(model)
        results.append(gradients(model, adapters))
    (one, grads), (other, theirs) = results
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert grads.keys() == theirs.keys()
    assert any("mod" in name for name in grads)
    for name in grads:
        torch.testing.assert_close(grads[name], theirs[name], rtol=2e-5, atol=1e-7)


def test_without_adapters_on_the_layers_gradients_are_the_same_bits() -> None:
    results = []
    for ahead in (False, True):
        model = dit()
        adapters = adapted(model, "blocks")
        if ahead:
            LookAhead(model, CPU).attach()
        results.append(gradients(model, adapters))
    (one, grads), (other, theirs) = results
    assert torch.equal(one, other)
    assert all(torch.equal(grads[name], theirs[name]) for name in grads)


def test_a_strength_that_changes_is_seen() -> None:
    model = dit()
    adapters = adapted(model, "all")
    LookAhead(model, CPU).attach()
    full = model(tokens())
    adapters.scale(0.5)
    assert not torch.equal(full, model(tokens()))


def test_quantised_layers_travel_with_their_scales() -> None:
    results = []
    for ahead in (False, True):
        model = dit()
        for module in [*model.modules()]:
            if isinstance(module, Modulation):
                module.lin = Fp8Linear.of(module.lin)
        if ahead:
            LookAhead(model, CPU).attach()
        results.append(model(tokens()))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda given: given._replace(y=given.y.clone().requires_grad_()), "conditioning vector is trained"),
    ],
)
def test_a_gradient_into_the_conditioning_is_refused(broken: Callable[..., object], message: str) -> None:
    model = dit()
    LookAhead(model, CPU).attach()
    with pytest.raises(ValueError, match=message):
        model(broken(tokens()))


def test_the_type_that_products_are_computed_in_is_part_of_the_key() -> None:
    plain = input_of(0.5).key()
    with torch.autocast("cpu", torch.bfloat16):
        assert input_of(0.5).key() != plain
    assert input_of(0.25).key() != plain
    assert input_of(0.5).key() == plain


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a value of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero"):
            raise AssertionError(f"{func} reads a value")
        return func(*args, **(kwargs or {}))


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody may bring an input to the host, which copies there would not show on a CPU."""

    def key(self: Conditioning) -> bytes:
        raise AssertionError("the input is read")

    monkeypatch.setattr(Conditioning, "key", key)


@pytest.mark.ledger("FS-04")
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_trusted_step_reads_nothing_back(recomputes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, ahead = dit(), dit()
    sets = [adapted(model, "all") for model in (resident, ahead)]
    look = LookAhead(ahead, CPU)
    look.attach()
    if recomputes:
        checkpoint_blocks(ahead)
    level = float(tokens().t[0])
    look.sweep([input_of(value) for value in (0.9, level, 0.2)], name="steps")
    look.trusted = "steps"
    unread(monkeypatch)
    expected = gradients(resident, sets[0])[1]
    given = tokens()
    with NoWaiting():
        ahead(given).square().mean().backward()
    found = {name: param.grad for name, param in sets[1].params.items()}
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=2e-5, atol=1e-7)
    look.confirm()
    assert (look.sweeps, look.missed) == (1, 0)


def test_drawing_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, ahead = dit(), dit()
    look = LookAhead(ahead, CPU, bakes=True)
    look.attach()
    announce(ahead, [input_of(float(tokens().t[0])), input_of(0.1)])
    unread(monkeypatch)
    with torch.no_grad():
        expected = resident(tokens())
        with NoWaiting():
            found = ahead(tokens())
    assert torch.equal(found, expected)
    confirm(ahead)


def test_a_trusted_input_that_was_not_announced_is_told() -> None:
    ahead = dit()
    adapted(ahead, "blocks")
    look = LookAhead(ahead, CPU)
    look.attach()
    look.sweep([input_of(0.1)], name="steps")
    look.trusted = "steps"
    ahead(tokens())
    with pytest.raises(RuntimeError, match="not announced"):
        look.confirm()
    with torch.no_grad():
        ahead(tokens())  # without gradient (validation) the host compares
    look.confirm()
    assert look.missed == 1
