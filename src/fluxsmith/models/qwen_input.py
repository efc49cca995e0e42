"""What Qwen2.5-VL reads: pictures as patches, text as ids with a place for every picture's tokens, and positions for all of them.

Written here because the library's own way to patches needs torchvision. `QwenText(tokenizer).read(text, [picture], pixels=...)`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.models.text_encoders import PreTrainedTokenizerBase

PATCH, TEMPORAL, MERGE = 14, 2, 2  # pixels of a patch, frames in it, patches of a token in each direction
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of pixels in [0, 1]
SPECIAL = {"image": "<|image_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}
TURNS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
SYSTEM = "You are a helpful assistant."
PICTURE = f"{SPECIAL['start']}{SPECIAL['image']}{SPECIAL['end']}"


class Pixels(NamedTuple):
    """How many pixels a picture is brought to."""

    least: int = 4 * 28 * 28
    most: int = 16384 * 28 * 28


class QwenInput(NamedTuple):
    """One conversation."""

    ids: Tensor  # (1, T)
    patches: Tensor  # (P, 3 * 2 * 14 * 14) of all pictures
    grids: tuple[tuple[int, int], ...]  # rows and columns of patches of each picture


def turn(role: str, text: str) -> str:
    """One turn of the conversation in the model's format."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def fitting(width: int, height: int, pixels: Pixels) -> tuple[int, int]:
    """The size a picture is scaled to: multiples of 28, its shape kept as far as they allow, within the limits."""
    step = PATCH * MERGE
    made = [max(step, round(side / step) * step) for side in (width, height)]
    if made[0] * made[1] > pixels.most:
        factor = math.sqrt(width * height / pixels.most)
        made = [max(step, math.floor(side / factor / step) * step) for side in (width, height)]
    elif made[0] * made[1] < pixels.least:
        factor = math.sqrt(pixels.least / (width * height))
        made = [math.ceil(side * factor / step) * step for side in (width, height)]
    return made[0], made[1]


def bounded(image: Image.Image, pixels: Pixels) -> Image.Image:
    """The picture in that size (bicubic)."""
    size = fitting(*image.size, pixels)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def patches_of(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """A picture whose sides are multiples of 28 -> patches (rows * columns, 3 * 2 * 14 * 14), fp32, and how many rows and columns."""
    values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    values = (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    rows, columns = (side // PATCH for side in values.shape[1:])
    cut = values.view(3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
    twice = cut.unsqueeze(5).expand(-1, -1, -1, -1, -1, TEMPORAL, -1, -1)  # a still picture is two equal frames
    return twice.reshape(rows * columns, -1), (rows, columns)


def tokens_of(grid: tuple[int, int]) -> int:
    """Tokens that a picture of this grid becomes."""
    return grid[0] * grid[1] // MERGE**2


class QwenText:
    """The tokenizer with the ids that stand for pictures."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str = "") -> None:
        """Raises ModelFileError for a tokenizer that knows no pictures."""
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab()
        missing = [text for text in SPECIAL.values() if text not in known]
        if missing:
            raise ModelFileError(f"this tokenizer has no {missing[0]}", where=where, fix="use the one of Qwen2.5-VL")
        self.image, self.end = known[SPECIAL["image"]], known[SPECIAL["end"]]

    def check(self, prompt: str) -> None:
        """Raises ConfigError for a prompt with marks that stand for pictures or turns."""
        marks = [mark for mark in (*SPECIAL.values(), *TURNS) if mark in prompt]
        if marks:
            why = "the language model would read it as a picture or as the end of a turn"
            raise ConfigError(f"the prompt has {marks[0]} in it", why=why, fix="leave it out")

    def ids(self, text: str) -> list[int]:
        """Text as it is, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def read(self, ids: Sequence[int], images: Sequence[Image.Image], pixels: Pixels | None = None) -> QwenInput:
        """Ids with one image id for each picture -> input, in which each stands as often as its picture has tokens."""
        seen = [patches_of(bounded(image, pixels or Pixels())) for image in images]
        grids = tuple(grid for _, grid in seen)
        if sum(one == self.image for one in ids) != len(grids):
            raise ValueError(f"{len(grids)} pictures and {sum(one == self.image for one in ids)} places for them")
        counts = iter(map(tokens_of, grids))
        made = [one for each in ids for one in ([each] * next(counts) if each == self.image else [each])]
        return QwenInput(torch.tensor([made]), torch.cat([patches for patches, _ in seen]), grids)


def positions(is_image: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Rotary positions (3, 1, T): time, row, column. Text counts on in all three; a picture starts after it, as a grid.

    `is_image` (1, T) says which tokens are of pictures, those of one picture in a row.
    """
    made, place, left = [], 0, iter(grids)
    for image, run in itertools.groupby(is_image[0].tolist()):
        length = len(list(run))
        while image and length:
            rows, columns = (side // MERGE for side in next(left))
            grid = torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(columns), indexing="ij")
            made.append(torch.stack([axis.flatten() for axis in grid]) + place)
            place, length = place + max(rows, columns), length - rows * columns
        if not image:
            made.append(torch.arange(place, place + length).expand(3, -1))
            place += length
    return torch.cat(made, dim=1)[:, None].to(is_image.device)
