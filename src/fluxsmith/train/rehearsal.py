"""What one block of each kind costs a run, found by running it on tensors without memory: bytes that wait for the backward pass, and peaks.

The blocks are the model's own classes with the run's adapters, quantised layers and checkpointing, so a plan knows what the code does
instead of what a formula says. Nothing is read; it takes about a second.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxsmith.config.choice import realise
from fluxsmith.config.schema import RunConfig
from fluxsmith.memory.checkpoint import Mode, checkpoint_blocks
from fluxsmith.memory.job import Cost, Costs
from fluxsmith.memory.live import LiveBytes
from fluxsmith.models.blocks import Block, Mods, SingleStreamBlock
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.layers import Modulation, ModulationOut
from fluxsmith.models.ops import LEAN, REFERENCE, use
from fluxsmith.quant.base import layer, quantise_linears
from fluxsmith.train.precision import resolved

TEXT = 64
MODES: tuple[Mode, ...] = ("keep", "selective", "boundary")
PLACE = "cpu"  # of the fake tensors; kernels and types are those of the run


def norm_of_a_card(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As `ops.LEAN.modulate` under a card's autocast, which computes norms in fp32."""
    return LEAN.modulate(x.float(), shift.float(), scale.float())


class Rehearsed(NamedTuple):
    """For which batch."""

    base: torch.dtype
    on_card: bool
    tokens: int
    batch: int


def rehearse(config: RunConfig, dit: FluxDiT, how: Rehearsed) -> Costs:
    """Costs of a block of each kind in each mode, for a transformer made by `plan_sizes.trained_sizes`.

    On a card kernels unpack quantised layers, so these are left as they are here, and the plan adds what a kernel needs.
    """
    base, on_card, tokens, batch = how
    image = max(tokens - TEXT, TEXT)
    firsts = _samples(dit)
    if config.quant is not None and not on_card:
        own = realise(config.quant)
        for name in {path for path, _ in firsts.values()}:
            with torch.device("meta"):
                quantise_linears(dit.get_submodule(name), lambda path, one: layer(own, path, one), prefix=f"dit.{name}.")
    kind = resolved(config.train.precision, torch.device("cuda" if on_card else "cpu"))
    if config.memory.reference_rounding:
        use(dit, REFERENCE)
    elif on_card and kind != "no":
        use(dit, LEAN._replace(modulate=norm_of_a_card))
    found: dict[tuple[str, str], Cost] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), _types(kind):
        for name, (_, block) in firsts.items():
            without_memory(block)
            for mode in MODES:
                sizes = _Run(dit, block, mode, base, batch).measure(image)
                found[name, mode] = Cost(*(size / (batch * (image + TEXT)) for size in sizes))
    return Costs(found, torch.empty((), dtype=base, device="meta").element_size())


def _samples(dit: FluxDiT) -> dict[str, tuple[str, nn.Module]]:
    """Path and block of each kind: the first double one, the first single one, and the last."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for kind, stack in (("double", dit.double_blocks), ("single", dit.single_blocks[:-1])):
        if len(stack):
            found[kind] = (f"{kind}_blocks.0", stack[0])
    if len(dit.single_blocks):
        last = len(dit.single_blocks) - 1
        found["last"] = (f"single_blocks.{last}", dit.single_blocks[last])
    return found


def _types(kind: str) -> AbstractContextManager[Any]:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind)
    return nullcontext() if dtype is None else torch.autocast(PLACE, dtype)


def without_memory(module: nn.Module) -> None:
    """Tensors of the meta device become fake ones of the CPU, so that types are chosen as they would be."""
    for one in module.modules():
        for name, param in [*one.named_parameters(recurse=False)]:
            if param.is_meta:
                fake = torch.empty(param.shape, dtype=param.dtype, device=PLACE)
                setattr(one, name, nn.Parameter(fake, requires_grad=param.requires_grad))
        for name, buffer in [*one.named_buffers(recurse=False)]:
            if buffer.is_meta:
                setattr(one, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=PLACE))
        for name, value in [*vars(one).items()]:
            if isinstance(value, Tensor) and value.is_meta:
                setattr(one, name, torch.empty(value.shape, dtype=value.dtype, device=PLACE))


class _Run:
    """One block, forward and backward."""

    def __init__(self, dit: FluxDiT, block: nn.Module, mode: Mode, base: torch.dtype, batch: int) -> None:
        self.dit, self.block, self.base, self.batch = dit, block, base, batch
        self.mode = mode

    def measure(self, tokens: int) -> tuple[int, int, int]:
        """Bytes held after the forward pass, and peaks of both passes over what was there when each began."""
        dit, block = self.dit, self.block
        if not isinstance(block, Block):
            raise TypeError(f"{type(block).__name__} is no block of FLUX")
        h = dit.params.hidden_size
        img = torch.empty(self.batch, tokens, h, dtype=self.base).requires_grad_(True)
        txt = torch.empty(self.batch, TEXT, h, dtype=self.base).requires_grad_(True)
        pe = torch.empty(self.batch, 1, TEXT + tokens, sum(dit.params.axes_dim) // 2, 2)
        call = dit.call
        if self.mode != "keep":
            checkpoint_blocks(dit, [self.mode] * len(dit.blocks))  # type: ignore[arg-type]  # one of MODES
        try:
            mods = self._modulations(block, h)
            with LiveBytes() as live:
                out = dit.call(block, img, txt, mods, pe, None, ())
                forward, held = live.peak.get(PLACE, 0), live.now.get(PLACE, 0)
                ends = [one for one in out if one.requires_grad]
                torch.autograd.backward(ends, [torch.empty_like(one) for one in ends])
                return held, forward, live.peak[PLACE] - held
        finally:
            dit.call = call
            for param in block.parameters():
                param.grad = None

    def _modulations(self, block: Block, h: int) -> Mods:
        """From the block's own layers, or (Chroma) from nowhere."""
        if any(isinstance(module, Modulation) for module in block.modules()):
            return block.modulations(torch.empty(self.batch, h, dtype=self.base))
        rows = 1 if isinstance(block, SingleStreamBlock) else 4
        return tuple(ModulationOut(*torch.empty(3, self.batch, 1, h, dtype=self.base)) for _ in range(rows))
