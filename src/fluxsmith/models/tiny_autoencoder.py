"""Tiny autoencoder for previews and small models (TAEF1, github.com/madebyollin/taesd), in the diffusers layout.

Its latents are the model-side ones already: scale 1, shift 0. Convolutions without norms; sizes come from the tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError


@dataclass(frozen=True)
class TinyAutoEncoderParams:
    """Width, latent channels, and residual blocks per level (encoder fine to coarse, decoder coarse to fine)."""

    width: int
    z_channels: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "TinyAutoEncoderParams":
        """Read sizes from tensor shapes in the diffusers layout; raises ModelFileError if the layout is another one."""
        try:
            return cls(
                width=shapes["encoder.layers.0.weight"][0],
                z_channels=shapes["decoder.layers.0.weight"][1],
                encoder_blocks=_runs(shapes, "encoder.layers."),
                decoder_blocks=_runs(shapes, "decoder.layers."),
            )
        except KeyError as missing:
            raise ModelFileError(f"the tiny autoencoder's size cannot be read: {missing}", fix="use a complete taef1 file") from None


def _runs(shapes: Mapping[str, Sequence[int]], prefix: str) -> tuple[int, ...]:
    """Lengths of the runs of residual blocks (layers with conv.0) between resampling convolutions (no bias)."""
    kinds: dict[int, str] = {}
    for key in shapes:
        if key.startswith(prefix):
            index, rest = key[len(prefix) :].split(".", 1)
            kind = "block" if rest.startswith("conv.") else "plain" if f"{prefix}{index}.bias" in shapes else "resample"
            kinds[int(index)] = kind
    runs = [0]
    for index in sorted(kinds):
        if kinds[index] == "resample":
            runs.append(0)
        runs[-1] += kinds[index] == "block"
    return tuple(runs)


class TinyBlock(nn.Module):
    """Three convolutions and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        conv = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), same out."""
        return self.fuse(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Pixels in [-1, 1] -> latents."""

    def __init__(self, p: TinyAutoEncoderParams) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, p.width, 3, padding=1)]
        for level, count in enumerate(p.encoder_blocks):
            if level:
                layers.append(nn.Conv2d(p.width, p.width, 3, padding=1, stride=2, bias=False))
            layers += [TinyBlock(p.width) for _ in range(count)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(p.width, p.z_channels, 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, z, H/8, W/8)."""
        return self.layers((pixels + 1) / 2)


class TinyDecoder(nn.Module):
    """Latents -> pixels in about [-1, 1]; large latents are squeezed by 3 tanh(z / 3) first."""

    def __init__(self, p: TinyAutoEncoderParams) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(p.z_channels, p.width, 3, padding=1), nn.ReLU()]
        last = len(p.decoder_blocks) - 1
        for level, count in enumerate(p.decoder_blocks):
            layers += [TinyBlock(p.width) for _ in range(count)]
            if level < last:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(p.width, p.width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(p.width, 3, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, z, h, w) -> (B, 3, 8h, 8w)."""
        return self.layers(torch.tanh(latents / 3) * 3) * 2 - 1


class TinyAutoEncoder(nn.Module):
    """Same interface as AutoEncoder."""

    def __init__(self, params: TinyAutoEncoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = TinyEncoder(params)
        self.decoder = TinyDecoder(params)

    @property
    def reduction(self) -> int:
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.params.encoder_blocks) - 1)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W) -> model-side latents; there is no posterior, so `noise` must be None."""
        if noise is not None:
            raise ValueError("a tiny autoencoder has no posterior to sample from")
        return self.encoder(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Model-side latents -> pixels (B, 3, H, W)."""
        return self.decoder(latents)


def bfl_name(key: str, part: str) -> str:
    """A key of the two-file release (`taef1_encoder`, `taef1_decoder`) in the one-file layout; the decoder counts from 1."""
    index, rest = key.split(".", 1)
    return f"{part}.layers.{int(index) - (part == 'decoder')}.{rest}"
