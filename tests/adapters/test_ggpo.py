"""GGPO's noise has the deviation that its formula says, begins with the second step, and costs nothing when it is off."""

import math

import pytest
import torch
from torch import Tensor

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.ggpo import Perturbation, product_row_norms
from fluxsmith.adapters.lora import Config, LoraPart
from fluxsmith.adapters.rows import part_modules
from fluxsmith.models.flux import FluxDiT

QKV = "dit.double_blocks.0.img_attn.qkv"
TARGET = {"targets": r"double_blocks\.0\.img_attn\.qkv", "rank": 3, "alpha": 2.0}


def stepped(dit: FluxDiT, **options: object) -> tuple[AdapterSet, Tensor]:
    """An adapter after one backward and one step of plain descent, and a batch of inputs."""
    torch.manual_seed(0)
    made = Config(ggpo_sigma=0.1, ggpo_beta=0.02, **TARGET, **options).build({"dit": dit})
    with torch.no_grad():
        for param in made.params.values():
            param.normal_(std=0.2)
    x = torch.randn(4, 7, 64)
    made.bases[QKV](x).square().mean().backward()
    made.after_backward()
    with torch.no_grad():
        for param in made.params.values():
            assert param.grad is not None
            param -= 0.01 * param.grad
    return made, x


def test_row_norms_without_the_product() -> None:
    left, right = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    assert torch.allclose(product_row_norms(left, right), (left @ right).norm(dim=1))


@pytest.mark.ledger("KS-30")
@pytest.mark.parametrize("split", [False, True])
def test_the_noise_has_the_strength_of_the_formula(dit: FluxDiT, split: bool) -> None:
    made, x = stepped(dit, split_qkv=split)
    before = {name: (param.detach().clone(), param.grad) for name, param in made.params.items()}
    figures = made.after_step()
    base = made.bases[QKV]
    factors = []
    for part in part_modules(made):
        assert isinstance(part, LoraPart)
        name = f"{QKV}.{part.name}." if part.name else f"{QKV}."
        (down, grad_down), (up, grad_up) = before[f"{name}down"], before[f"{name}up"]
        rows, scale = base.weight[part.rows[0] : part.rows[1]], 2 / 3
        at_backward = {"down": down + 0.01 * grad_down, "up": up + 0.01 * grad_up}
        gradient = scale * (at_backward["up"] @ grad_down + grad_up @ at_backward["down"])
        norms = (rows.norm(dim=1).mean() ** 2 + (scale * up @ down).norm(dim=1) ** 2).sqrt()
        factors.append((0.1 * norms + 0.02 * gradient.norm(dim=1) ** 2) / math.sqrt(len(rows)))
        assert part.ggpo is not None
        assert torch.allclose(part.ggpo.factor, factors[-1], rtol=1e-4)  # type: ignore[arg-type]
    wanted = torch.cat(factors) * x[0, 0].norm()  # of an output for one input
    base.eval()
    still = base(x[:1, :1])
    assert torch.equal(still, base(x[:1, :1]))
    base.train()
    drawn = torch.stack([(base(x[:1, :1]) - still)[0, 0].detach() for _ in range(600)])
    assert torch.allclose(drawn.std(dim=0), wanted, rtol=0.25)
    assert (drawn.std(dim=0) / wanted).mean() == pytest.approx(1, abs=0.02)
    assert drawn.mean(dim=0).abs().max() < 0.25 * wanted.max()
    assert set(figures) == {"avg_grad_norm", "avg_combined_norm"}


@pytest.mark.ledger("KS-30")
def test_the_first_step_has_no_noise(dit: FluxDiT) -> None:
    made = Config(ggpo_sigma=0.1, ggpo_beta=0.01, **TARGET).build({"dit": dit})
    base, x = made.bases[QKV], torch.randn(1, 64)
    base.train()
    assert torch.equal(base(x), base(x))
    assert made.after_step() == {}
    assert torch.equal(base(x), base(x))


def test_the_noise_has_no_gradient_of_its_own(dit: FluxDiT) -> None:
    made, x = stepped(dit)
    made.after_step()
    base = made.bases[QKV].train()
    grads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        for param in made.params.values():
            param.grad = None
        base(x).sum().backward()
        grads.append(made.params[f"{QKV}.up"].grad)
    assert torch.allclose(*grads)  # type: ignore[arg-type]


@pytest.mark.ledger("KS-30")
def test_a_resumed_run_has_the_same_noise(dit: FluxDiT) -> None:
    made, x = stepped(dit)
    made.after_step()
    extra = made.extra()
    assert set(extra) == {f"{QKV}.ggpo"}
    torch.manual_seed(5)
    wanted = made.bases[QKV].train()(x)
    values = {name: param.detach().clone() for name, param in made.params.items()}
    made.detach()
    again = Config(ggpo_sigma=0.1, ggpo_beta=0.02, **TARGET).build({"dit": dit})
    with torch.no_grad():
        for name, param in again.params.items():
            param.copy_(values[name])
    again.load_extra(extra)
    torch.manual_seed(5)
    assert torch.equal(again.bases[QKV].train()(x), wanted)


def test_off_is_free(dit: FluxDiT) -> None:
    made = Config(**TARGET).build({"dit": dit})
    made.after_backward()
    assert made.after_step() == {}
    assert made.extra() == {}
    with pytest.raises(ValueError, match="ggpo_sigma and ggpo_beta go together"):
        Config(ggpo_sigma=0.1)


def test_base_norms_are_those_of_the_rows() -> None:
    weight = torch.randn(6, 4)
    assert Perturbation(1, 1, weight).base_norm == pytest.approx(float(weight.norm(dim=1).mean()))
