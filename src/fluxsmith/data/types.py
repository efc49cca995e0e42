"""What travels from a folder to the training step: Record -> (cache) -> Sample -> Batch, all immutable.

A `Record` is one picture as its source found it; a `BatchSpec` says which uses of which records form a micro-batch;
a `Batch` is what one forward pass needs, already on the host.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fluxsmith.models.text_states import TextStates

__all__ = ["Batch", "BatchSpec", "Encoders", "Record", "Size", "TextStates", "Use"]


class Size(NamedTuple):
    """Width and height, pixels."""

    width: int
    height: int


class Record(NamedTuple):
    """One picture as a source found it; nothing decoded yet."""

    path: Path
    key: str  # path relative to the source, with / as separator: stable across machines
    caption: str | None  # None: no caption was found
    caption_path: Path | None = None
    mask_path: Path | None = None
    condition_path: Path | None = None


class Use(NamedTuple):
    """One use of one picture: `number` counts uses over the whole run, so draws keyed by it never repeat or depend on workers."""

    dataset: int
    record: int  # position in the dataset's list of usable records
    number: int  # global: epoch * uses_in_epoch + place in the epoch


class BatchSpec(NamedTuple):
    """The uses that form one micro-batch: same bucket, and same dataset or group of datasets."""

    epoch: int
    dataset: int  # the first of the group; `Use.dataset` is each sample's own
    bucket: Size
    uses: tuple[Use, ...]


class Batch(NamedTuple):
    """A micro-batch on the host."""

    keys: tuple[str, ...]  # record keys, for messages
    indices: tuple[int, ...]  # Use.number of every sample
    captions: tuple[str, ...]  # the captions as used (after dropout, shuffle ...)
    latents: Tensor | None  # (B, 16, h, w) model-side; None when latents are not wanted or not cached
    pixels: Tensor | None  # (B, 3, H, W) in [-1, 1]; only when latents are not cached
    text: TextStates | None  # None when captions are encoded in the step
    weights: Tensor  # (B,) factor on each sample's loss
    mask: Tensor | None = None  # (B, 1, h, w) loss mask in latent resolution, 0..1; None when no dataset of the batch has masks
    condition: Tensor | None = None  # (B, 3, H, W) condition pictures in [-1, 1], cropped and mirrored as their pictures
    preserve: Tensor | None = None  # (B,) bool: train towards the base model's own prediction; None when no sample asks


class Encoders(NamedTuple):
    """How caches are filled; a digest identifies files and settings, so that a changed model is noticed."""

    latents: Callable[[Tensor], Tensor] | None  # pixels (B,3,H,W) in [-1,1] -> latents (B,16,H/8,W/8)
    latents_digest: str
    text: Callable[[list[str]], TextStates] | None
    text_digest: str
    token_counts: Callable[[str], dict[str, tuple[int, int]]] | None = None  # caption -> {"clip_l": (used, limit), "t5xxl": (used, limit)}
