"""FLUX.1's autoencoder (KL form) in the keys of ae.safetensors: pixels in [-1, 1] <-> model-side latents.

Model-side latents are `scale * (z - shift)` with 0.3611 and 0.1159. All sizes come from the tensors:
`AutoEncoder(AutoEncoderParams.from_shapes(shapes))`. Large pictures go through `models/tiling.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError

SCALE, SHIFT = 0.3611, 0.1159  # black-forest-labs/flux, ae params
GROUPS = 32


@dataclass(frozen=True)
class AutoEncoderParams:
    """The numbers an autoencoder is built from."""

    widths: tuple[int, ...]  # channels per level, fine to coarse
    num_res_blocks: int
    z_channels: int
    in_channels: int = 3
    groups: int = GROUPS
    scale: float = SCALE
    shift: float = SHIFT

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "AutoEncoderParams":
        """Read every size from tensor shapes in BFL keys; raises ModelFileError if one is missing."""
        try:
            levels = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.down."))
            widths = tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels))
            blocks = 1 + max(int(key.split(".")[4]) for key in shapes if key.startswith("encoder.down.0.block."))
            return cls(widths, blocks, shapes["decoder.conv_in.weight"][1], shapes["encoder.conv_in.weight"][1])
        except (KeyError, ValueError) as missing:
            raise ModelFileError(f"the autoencoder's size cannot be read: {missing}", fix="use a complete ae.safetensors") from None


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with a skip."""

    def __init__(self, in_dim: int, out_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_dim, eps=1e-6)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_dim, eps=1e-6)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        if in_dim != out_dim:
            self.nin_shortcut = nn.Conv2d(in_dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions; weights are 1x1 convolutions."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(dim, dim, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W), same out."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """Halve both sides; padding only at the right and bottom edge, as trained."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides by nearest neighbour, then a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Two residual blocks around attention, at the coarsest level."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(dim, dim, groups)
        self.attn_1 = AttnBlock(dim, groups)
        self.block_2 = ResBlock(dim, dim, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W), same out."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, and the change of resolution after them."""

    def __init__(self, dims: list[int], resample: nn.Module | None, name: str, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b, groups) for a, b in zip(dims[:-1], dims[1:], strict=True))
        self.attn = nn.ModuleList()  # the reference has the slot and leaves it empty
        self.resample_name = name if resample is not None else ""
        if resample is not None:
            self.add_module(name, resample)

    def forward(self, x: Tensor) -> Tensor:
        """Blocks, then down- or upsampling if this level has it."""
        for block in self.block:
            x = block(x)
        return self.get_submodule(self.resample_name)(x) if self.resample_name else x


class Encoder(nn.Module):
    """Pixels -> mean and log-variance."""

    def __init__(self, p: AutoEncoderParams) -> None:
        super().__init__()
        widths, last = p.widths, len(p.widths) - 1
        self.conv_in = nn.Conv2d(p.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            dims = [widths[max(level - 1, 0)]] + [width] * p.num_res_blocks
            self.down.append(Level(dims, Downsample(width) if level < last else None, "downsample", p.groups))
        self.mid = Middle(widths[-1], p.groups)
        self.norm_out = nn.GroupNorm(p.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * p.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2z, H/8, W/8)."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents z -> pixels; levels are stored fine to coarse and run coarse to fine."""

    def __init__(self, p: AutoEncoderParams) -> None:
        super().__init__()
        widths, last = p.widths, len(p.widths) - 1
        self.conv_in = nn.Conv2d(p.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], p.groups)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            dims = [widths[min(level + 1, last)]] + [width] * (p.num_res_blocks + 1)
            self.up.append(Level(dims, Upsample(width) if level > 0 else None, "upsample", p.groups))
        self.norm_out = nn.GroupNorm(p.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], p.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z, H/8, W/8) -> (B, 3, H, W)."""
        x = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Encode to the latents the transformer works on, and back."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    @property
    def reduction(self) -> int:
        """Pixels per latent cell along a side (8 for FLUX)."""
        return 2 ** (len(self.params.widths) - 1)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z for pixels (B, 3, H, W) in [-1, 1]; the log-variance is kept in [-30, 20]."""
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels -> model-side latents (B, z, H/8, W/8): the mean, or a posterior sample made with unit `noise`."""
        mean, logvar = self.moments(pixels)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return self.params.scale * (z - self.params.shift)

    def decode(self, latents: Tensor) -> Tensor:
        """Model-side latents -> pixels, about [-1, 1]."""
        return self.decoder(latents / self.params.scale + self.params.shift)
