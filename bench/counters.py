"""What one LoRA training step costs, in numbers that repeat exactly: kernels, traffic, saved memory, FLOPs. The gate of CI.

`python bench/counters.py --json` prints `{"plain": {"kernels", "non_matmul_mb", "saved_mb", "gflop"}, "checkpointed": {...}}`.
The model has FLUX's structure at hidden 256 (2 x 128 heads, 4 double and 8 single blocks), 256 image and 64 text tokens, batch 1, fp32,
LoRA of rank 16 on every block linear but modulation. Views are no kernels; traffic is what every other kernel reads and writes, matrix
products and attention left out; saved is what autograd keeps, parameters left out.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src")]

from fluxsmith.adapters.base import linear_layers  # noqa: E402  needs the path above
from fluxsmith.bench.counting import Counters  # noqa: E402
from fluxsmith.config.choice import realise  # noqa: E402
from fluxsmith.config.load import load_config  # noqa: E402
from fluxsmith.memory.checkpoint import checkpoint_blocks  # noqa: E402
from fluxsmith.models.assembly import Level, TextStates, velocity  # noqa: E402
from fluxsmith.models.flux import FluxDiT, FluxParams  # noqa: E402
from fluxsmith.quant.base import plugin, quantise  # noqa: E402

PARAMS = FluxParams(
    in_channels=64, out_channels=64, vec_in_dim=64, context_in_dim=128, hidden_size=256, mlp_hidden=1024, num_heads=2, depth=4,
    depth_single_blocks=8, axes_dim=(16, 56, 56),
)  # fmt: skip
SIDE, TEXT, RANK = 32, 64, 16  # latents (16 x 16 tokens), text tokens, LoRA rank


def build(*, checkpointed: bool, quant: str = "") -> tuple[FluxDiT, dict[str, torch.nn.Parameter]]:
    """The transformer, on a base of a kind, and the LoRA's parameters."""
    torch.manual_seed(0)
    dit = FluxDiT(PARAMS).requires_grad_(False).eval()
    for linear in linear_layers({"dit": dit}).values():
        torch.nn.init.normal_(linear.weight, std=0.02)
    plain = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}
    if quant:
        quantise(plugin(quant), "dit", dit)
    config = load_config({**plain, "adapter": {"type": "lora", "rank": RANK, "targets": "blocks"}}).config
    adapters = realise(config.adapter).build({"dit": dit}, seed=0)
    if checkpointed:
        checkpoint_blocks(dit)
    return dit, dict(adapters.params)


def step(dit: FluxDiT) -> Callable[[], Tensor]:
    """The loss of one sample, as the trainer computes it."""
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(1, 16, SIDE, SIDE, generator=generator) for _ in range(2))
    text = TextStates(
        torch.randn(1, TEXT, PARAMS.context_in_dim, generator=generator),
        torch.randn(1, PARAMS.vec_in_dim, generator=generator),
        torch.ones(1, TEXT, dtype=torch.bool),
    )
    level = Level(torch.tensor([0.6]), torch.tensor([1.0]))

    def loss() -> Tensor:
        return (velocity(dit, 0.4 * latents + 0.6 * noise, text, level) - (noise - latents)).square().mean()

    return loss


def measure(*, checkpointed: bool, quant: str = "") -> dict[str, float]:
    """The four numbers of a second step (the first one fills what is made once)."""
    dit, params = build(checkpointed=checkpointed, quant=quant)
    loss = step(dit)
    loss().backward()
    own = {param.untyped_storage()._cdata for param in [*dit.parameters(), *dit.buffers(), *params.values()]}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        kept.append(tensor)
        return tensor

    for param in params.values():
        param.grad = None
    kept: list[Tensor] = []  # or storages could be freed and counted twice under one address
    counters, flops = Counters(), FlopCounterMode(display=False)
    with flops, counters:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        saved_bytes = sum(saved.values())
        kept.clear()
        value.backward()
    return {
        "kernels": counters.kernels,
        "non_matmul_mb": round(counters.bytes / 1e6, 1),
        "saved_mb": round(saved_bytes / 1e6, 2),
        "gflop": round(flops.get_total_flops() / 1e9, 2),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quant", default="", metavar="KIND", help="a quantised base: fp8, int8, int4, int2, nf4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(checkpointed=name == "checkpointed", quant=options.quant) for name in ("plain", "checkpointed")}
    print(json.dumps(found) if options.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
