"""Pixels -> pictures as DiffSynth-Studio makes them: values are cut off, not rounded."""

from PIL import Image
from torch import Tensor


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> 8-bit picture."""
    values = pixels.float().clamp(-1, 1).add(1).mul(127.5).byte()
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())
