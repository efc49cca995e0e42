"""Every kind of quantised base, one small layer, a small transformer, and how far two tensors are apart."""

from typing import Any

import tiny_run
import torch
from streams import tokens
from torch import Tensor, nn

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.config.choice import config_class, realise
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.linear import Linear
from fluxsmith.quant.base import plugin

BASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> kind, options
    "fp8": ("fp8", {}),
    "fp8-dynamic": ("fp8", {"compute": "dynamic"}),
    "int8": ("int8", {}),
    "int8-dynamic": ("int8", {"compute": "dynamic"}),
    "int4": ("int4", {}),
    "int4-symmetric": ("int4", {"symmetric": True, "group": 64}),
    "int2": ("int2", {}),
    "nf4": ("nf4", {"backend": "torch"}),
    "nf4-kernel": ("nf4", {"backend": "bitsandbytes"}),
}
EXACT = [name for name in BASES if "dynamic" not in name]  # their product is that of the dequantised weight


def config_of(name: str, **more: Any) -> Any:
    """The `Config` of a base."""
    kind, options = BASES[name]
    return plugin(kind).model_copy(update={**options, **more})


def layer(out_features: int = 48, in_features: int = 64) -> Linear:
    """Frozen, normally distributed weights."""
    made = Linear(in_features, out_features)
    with torch.no_grad():
        torch.nn.init.normal_(made.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(made.bias, generator=torch.Generator().manual_seed(1))
    return made.requires_grad_(False)


def relative(one: Tensor, other: Tensor) -> float:
    """Relative L2 distance."""
    return float((one - other).detach().norm() / other.detach().norm())


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two tensors."""
    return float(torch.nn.functional.cosine_similarity(one.detach().flatten().double(), other.detach().flatten().double(), dim=0))


def normal_dit() -> FluxDiT:
    """The tiny transformer with weights distributed as trained ones are."""
    dit, generator = tiny_run.random_dit(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in dit.modules():
            if isinstance(module, Linear):
                module.weight.normal_(std=0.7 * module.in_features**-0.5, generator=generator)
    return dit.requires_grad_(False)


def adapted(dit: nn.Module, kind: str = "lora", **options: object) -> AdapterSet:
    rank = {"boft": 96, "oft": 8}.get(kind, 4)
    config = config_class("fluxsmith.adapters", kind)(type=kind, rank=rank, **options)
    made = realise(config).build({"dit": dit}, seed=1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in made.params.values():
            param.add_(torch.randn(param.shape, generator=generator) * 0.02)  # past the start, where half of the gradients are zero
    return made


def gradients(dit: FluxDiT, made: AdapterSet) -> list[torch.Tensor]:
    target = torch.randn(dit(tokens(0)).shape, generator=torch.Generator().manual_seed(3))
    (dit(tokens(0)) - target).square().mean().backward()
    return [param.grad for param in made.params.values()]


class Lora(nn.Module):
    """The least that is one pair of factors."""

    def __init__(self, out_features: int = 48, in_features: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.down = nn.Parameter(torch.randn(4, in_features, generator=generator) / 8)
        self.up = nn.Parameter(torch.randn(out_features, 4, generator=generator) / 2)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.down, self.up, torch.tensor(0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x @ self.down.T @ self.up.T * 0.5
