"""Models of three sizes with random weights: the same code runs in a test on the CPU and at 12B on a card. Nothing is downloaded.

`random_dit(SIZES["full"], quant, device)` builds on meta and fills block by block on the device; no two blocks are there in full
before they are quantised. Values are those of a trained model in scale: nothing is timed on zeros.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fluxsmith.config.choice import realise
from fluxsmith.config.section import PluginConfig
from fluxsmith.io.canonical import Source
from fluxsmith.memory.sizes import Counts, count
from fluxsmith.models.autoencoder import AutoEncoder, AutoEncoderParams
from fluxsmith.models.fill import ByBlock, fill, fill_by_block, finish, meta, shapes_of
from fluxsmith.models.flux import FluxDiT, FluxParams, axes_for_head
from fluxsmith.quant.base import by_block
from fluxsmith.randomness import seed_for

SPREAD = 0.7  # of a layer's output, for inputs of spread 1: 0.49 / inputs is the variance of a weight
MODULATION_SPREAD = 0.5  # gates come out at about a tenth
BIAS = 0.02
REAL_BLOCKS = 57


@dataclass(frozen=True)
class Size:
    """A model, and by how much pictures and captions are smaller than the scenario says."""

    name: str
    params: FluxParams
    smaller: int = 1
    ae_widths: tuple[int, ...] = (128, 256, 512, 512)

    def side(self, pixels: int) -> int:
        """Pixels of a picture's side."""
        return max(32, pixels // self.smaller // 16 * 16)

    def text(self, tokens: int) -> int:
        """Text tokens."""
        return max(8, tokens // self.smaller)

    def blocks(self, number: int) -> int:
        """So many of FLUX.1's 57 blocks, in proportion."""
        return max(1, round(number * self.total / REAL_BLOCKS))

    @property
    def total(self) -> int:
        """Blocks."""
        return self.params.depth + self.params.depth_single_blocks

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the transformer."""
        return shapes_of(meta(lambda: FluxDiT(self.params)))

    @property
    def counts(self) -> Counts:
        """Parameters by where they live."""
        return count(self.shapes)


def tiny_params(hidden: int, heads: int, depth: int, depth_single: int) -> FluxParams:
    """FLUX's structure at another width and depth."""
    return _params(hidden, heads, depth, depth_single, 32)


def _params(hidden: int, heads: int, depth: int, depth_single: int, context: int) -> FluxParams:
    return FluxParams(
        in_channels=64, out_channels=64, vec_in_dim=min(768, hidden), context_in_dim=context, hidden_size=hidden, mlp_hidden=4 * hidden,
        num_heads=heads, depth=depth, depth_single_blocks=depth_single, axes_dim=axes_for_head(hidden // heads),
    )  # fmt: skip


SIZES: Mapping[str, Size] = {
    "tiny": Size("tiny", _params(64, 2, 2, 4, 32), smaller=8, ae_widths=(32, 32, 32, 32)),
    "half": Size("half", _params(3072, 24, 9, 19, 4096)),
    "full": Size("full", _params(3072, 24, 19, 38, 4096)),
}


def drawn(key: str, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """The random value of a parameter: it depends on name, seed and kind of device alone."""
    if key.endswith("norm.scale"):
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(seed_for(seed, "bench", key))
    made = torch.empty(shape, device=device).normal_(generator=generator)
    if len(shape) < 2:
        return made.mul_(BIAS)
    inputs = made[0].numel()
    is_modulation = "mod.lin" in key or "modulation" in key
    return made.mul_((MODULATION_SPREAD if is_modulation else SPREAD) * inputs**-0.5)


def sources(module: nn.Module, seed: int, device: torch.device) -> dict[str, Source]:
    """Every parameter of a module, as a file would give it."""

    def reader(key: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        return lambda: drawn(key, shape, seed, device)

    return {key: Source(shape, reader(key, shape)) for key, shape in shapes_of(module).items()}


def random_dit(
    size: Size, quant: PluginConfig | None, device: torch.device, *, dtype: torch.dtype, place: torch.device | None = None, seed: int = 0
) -> FluxDiT:  # fmt: skip
    """The transformer, filled and quantised block by block on `device`; it stays on `place`, which is the device by default."""
    dit, place = meta(lambda: FluxDiT(size.params)), place or device
    how = None if quant is None else by_block(realise(quant), "dit", device)
    plain = ByBlock(device, lambda path, block: None, lambda path, linear, source: None)
    fill_by_block(dit, sources(dit, seed, device), how or plain, device=place, dtype=dtype)
    finish(dit)
    return dit.requires_grad_(False)


def random_ae(size: Size, device: torch.device, *, dtype: torch.dtype, seed: int = 0) -> AutoEncoder:
    """The autoencoder."""
    made = meta(lambda: AutoEncoder(AutoEncoderParams(size.ae_widths, 2, 16)))
    values: dict[str, Any] = {key: source.read for key, source in sources(made, seed, device).items()}
    fill(made, values, device=device, dtype=dtype)
    finish(made)
    return made.requires_grad_(False)
