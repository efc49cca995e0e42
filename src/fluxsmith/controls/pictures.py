"""Pictures for controls: opened from a file or taken as they are, brought to a size, and turned into pixels in [-1, 1]."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fluxsmith.io.images import read_image


def opened(picture: Any) -> Image.Image:
    """An RGB picture from a path or a picture of Pillow. Raises DataError for a file that cannot be read."""
    return read_image(picture).image if isinstance(picture, str | Path) else picture.convert("RGB")


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled and cropped at its centre to a size (Lanczos); a picture of this size is left alone."""
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_multiple(image: Image.Image, multiple: int = 16) -> Image.Image:
    """Scaled and cropped a little so that both sides are multiples, as the autoencoder and the patches need."""
    width, height = (max(multiple, side // multiple * multiple) for side in image.size)
    return cover(image, width, height)


def pixels(image: Image.Image) -> Tensor:
    """RGB picture -> (1, 3, H, W) in [-1, 1], fp32 on the host."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float().div(127.5).sub(1)
