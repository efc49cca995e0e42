"""Quantised bases on a card: 8-bit products are those of the CPU's emulation, and a two-block model of FLUX's full width is near fp32."""

from typing import Any

import pytest
import torch
from quantised import BASES, config_of, cosine, layer, relative

from fluxsmith.models.flux import FluxDiT, FluxParams
from fluxsmith.models.linear import Linear
from fluxsmith.models.packing import image_ids, text_ids
from fluxsmith.models.stream import Tokens
from fluxsmith.quant.base import QuantLinear, quantise

pytestmark = pytest.mark.gpu
GATES = {"fp8": 4e-2, "int8": 4e-2, "int4": 8e-2, "nf4": 8e-2, "int2": 0.4}
ANGLES = {"fp8": 0.99, "int8": 0.99, "int4": 0.97, "nf4": 0.97, "int2": 0.5}


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("name", ["fp8-dynamic", "int8-dynamic"])
def test_products_are_those_of_the_emulation(name: str, rows: int) -> None:
    base, config = layer(96, 128), config_of(name)
    results = []
    for device in ("cpu", "cuda"):
        one = config.make(base, config.encode(base.weight)).to(device)
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16).requires_grad_()
        y = one.matmul(x)
        y.backward(torch.randn(rows, 96, generator=torch.Generator().manual_seed(2)).to(y))
        results.append((y.cpu().float(), x.grad.cpu().float()))
    for here, there in zip(*results, strict=True):
        assert relative(there, here) < 5e-3


def full_width() -> FluxDiT:
    """One block of each kind of FLUX.1-dev, weights as the benchmark draws them."""
    params = FluxParams(
        in_channels=64, out_channels=64, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_hidden=12288, num_heads=24,
        depth=1, depth_single_blocks=1, axes_dim=(16, 56, 56),
    )  # fmt: skip
    with torch.device("cuda"):
        dit = FluxDiT(params)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for path, module in dit.named_modules():
            if isinstance(module, Linear):
                gain = 0.1 if "mod" in path else 0.7
                module.weight.normal_(std=gain * module.in_features**-0.5, generator=generator)
                module.bias.normal_(std=0.02, generator=generator)
    return dit.requires_grad_(False)


def tokens() -> Tokens:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).cuda()  # noqa: E731
    ids = [one.cuda() for one in (image_ids(1, 32, 32), text_ids(1, 64))]
    return Tokens(draw(1, 256, 64), ids[0], draw(1, 64, 4096), ids[1], draw(1, 768), torch.tensor([0.5]).cuda(), torch.tensor([3.5]).cuda())


def measured(dit: FluxDiT, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocity, and the gradient of the inputs (what every adapter's gradient is made of)."""
    given = tokens()
    img = given.img.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=how.get("autocast", True)):
        y = dit(given._replace(img=img))
    y.float().square().mean().backward()
    assert img.grad is not None
    return y.detach().float(), img.grad.float()


@pytest.mark.ledger("KS-21")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_two_blocks_of_full_width(name: str, compiled: bool) -> None:
    exact = measured(full_width(), autocast=False)
    dit = full_width()
    quantise(config_of(name), "dit", dit)
    assert all(isinstance(one, QuantLinear) for block in dit.blocks for one in block.modules() if isinstance(one, Linear))
    if compiled:
        for block in dit.blocks:
            block.compile(fullgraph=True, dynamic=False)
    found, kind = measured(dit), BASES[name][0]
    assert relative(found[0], exact[0]) < GATES[kind]
    assert cosine(found[1], exact[1]) > ANGLES[kind]
