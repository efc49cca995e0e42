"""What one LoRA training step costs, in numbers that repeat exactly: kernels, traffic, saved memory, FLOPs. The gate of CI.

`python bench/counters.py --json` prints `{"plain": {"kernels", "non_matmul_mb", "saved_mb", "gflop"}, "checkpointed": {...}}`.
The model has FLUX's structure at hidden 256 (2 x 128 heads, 4 double and 8 single blocks), 256 image and 64 text tokens, batch 1, fp32,
LoRA of rank 16 on every block linear but modulation. Views are no kernels; traffic is what every other kernel reads and writes, matrix
products and attention left out; saved is what autograd keeps, parameters left out.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src")]

from fluxsmith.adapters.base import linear_layers  # noqa: E402  needs the path above
from fluxsmith.config.choice import realise  # noqa: E402
from fluxsmith.config.load import load_config  # noqa: E402
from fluxsmith.memory.checkpoint import checkpoint_blocks  # noqa: E402
from fluxsmith.models.assembly import Level, TextStates, velocity  # noqa: E402
from fluxsmith.models.flux import FluxDiT, FluxParams  # noqa: E402

PARAMS = FluxParams(
    in_channels=64, out_channels=64, vec_in_dim=64, context_in_dim=128, hidden_size=256, mlp_hidden=1024, num_heads=2, depth=4,
    depth_single_blocks=8, axes_dim=(16, 56, 56),
)  # fmt: skip
SIDE, TEXT, RANK = 32, 64, 16  # latents (16 x 16 tokens), text tokens, LoRA rank
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")


class Counters(TorchDispatchMode):
    """Counts what is dispatched below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.bytes = 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # the hook's own signature
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not _is_view(func, given, made):
            name = func.overloadpacket.__name__
            self.kernels += 1
            self.by_name[name] = self.by_name.get(name, 0) + 1
            if name not in PRODUCTS and "scaled_dot_product" not in name:
                self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in given + made)
        return result


def _is_view(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """True if nothing is computed: every result shares memory with an argument, and none is written to."""
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return bool(made) and all(tensor.untyped_storage()._cdata in storages for tensor in made)


def build(*, checkpointed: bool) -> tuple[FluxDiT, dict[str, torch.nn.Parameter]]:
    """The transformer and the LoRA's parameters."""
    torch.manual_seed(0)
    dit = FluxDiT(PARAMS).requires_grad_(False).eval()
    for linear in linear_layers({"dit": dit}).values():
        torch.nn.init.normal_(linear.weight, std=0.02)
    plain = {"model": {"type": "flux1"}, "train": {"steps": 1}, "data": [{"type": "folder", "path": "x"}], "run": {"dir": "y"}}
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


def measure(*, checkpointed: bool) -> dict[str, float]:
    """The four numbers of a second step (the first one fills what is made once)."""
    dit, params = build(checkpointed=checkpointed)
    loss = step(dit)
    loss().backward()
    own = {param.untyped_storage()._cdata for param in [*dit.parameters(), *params.values()]}
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"plain": measure(checkpointed=False), "checkpointed": measure(checkpointed=True)}
    print(json.dumps(found) if options.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
