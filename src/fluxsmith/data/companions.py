"""Pictures that go with a picture: its loss mask, and its condition picture, found by name in a folder of their own.

A companion has the same proportions as its picture, and is resized, cropped and mirrored with it.
`records, problems = with_companions(listing, config)` then `read_mask(item.mask, placement, config)`.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.data.buckets import Placement
from fluxsmith.data.sources.base import PICTURES, Listing, shown
from fluxsmith.data.transforms import PixelPlan, filter_for, loss_mask, pixels
from fluxsmith.data.types import Record, Size
from fluxsmith.errors import DataError, Problem
from fluxsmith.io.images import read_image

LISTED = 5
BLACK = (0, 0, 0)  # what a transparent part of a mask means


class Companion(NamedTuple):
    """A mask or condition picture that fits its picture; `is_alpha`: it is the transparency of the picture itself."""

    path: Path
    digest: str  # SHA-256 of the file
    size: Size
    is_alpha: bool = False


def with_companions(listing: Listing, config: DatasetConfig) -> tuple[tuple[Record, ...], list[Problem]]:
    """The records with the paths of their masks and condition pictures, and which are missing or left over."""
    records, problems = list(listing.records), []
    others = [key for key, _ in listing.problems]
    if config.mask_dir is not None:
        found, new = _matched(records, others, config.mask_dir, ("mask", "mask_dir"))
        problems += new
        records = [record._replace(mask_path=path) for record, path in zip(records, found, strict=True)]
    if config.condition_dir is not None:
        found, new = _matched(records, others, config.condition_dir, ("condition picture", "condition_dir"))
        problems += new
        records = [record._replace(condition_path=path) for record, path in zip(records, found, strict=True)]
    return tuple(records), problems


def _matched(
    records: Sequence[Record], others: Sequence[str], folder: Path, naming: tuple[str, str]
) -> tuple[list[Path | None], list[Problem]]:
    """The file of each record; `others` are names of pictures that cannot be used, whose files are not left over."""
    what, option = naming
    if not folder.is_dir():
        return [None] * len(records), [Problem(f"{option} is not a folder", shown(folder), "", f"check data.{option}")]
    listed = list(_pictures(folder, below=any("/" in key for key in (*others, *(record.key for record in records)))))
    files = dict(listed)
    names = Counter(Path(record.key).stem for record in records)
    paths: list[Path | None] = []
    taken: set[str] = set()
    for record in records:
        stem = _stem(record.key)
        if stem not in files and names[Path(stem).name] == 1:  # a name says enough where only one picture has it
            stem = Path(stem).name
        taken.add(stem)
        paths.append(files.get(stem))
    problems = []
    missing = [record.key for record, path in zip(records, paths, strict=True) if path is None]
    if missing:
        where, fix = shown(folder), f"add them under the names of their pictures, or remove {option}"
        problems.append(Problem(f"{len(missing)} pictures have no {what}: {_some(missing)}", where, "", fix))
    known = taken | {_stem(key) for key in others} | {Path(key).stem for key in others}
    surplus = [path for stem, path in listed if stem not in known or path != files[stem]]
    if surplus:
        names_left = _some(sorted(path.relative_to(folder).as_posix() for path in surplus))
        fix = "delete or rename them: a misspelt name would leave a picture without one"
        problems.append(Problem(f"{len(surplus)} files belong to no picture: {names_left}", shown(folder), "", fix))
    return paths, problems


def _pictures(folder: Path, *, below: bool) -> Iterator[tuple[str, Path]]:
    """(relative name without ending, path) of every picture, in a fixed order; hidden ones are left alone."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if below and not name.startswith("."))
        for name in sorted(names, reverse=True):
            path = Path(parent) / name
            if path.suffix.lower() in PICTURES and not name.startswith("."):
                yield _stem(path.relative_to(folder).as_posix()), path


def _stem(key: str) -> str:
    return key.strip("/")[: len(key.strip("/")) - len(Path(key).suffix)]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(shown(name) for name in names[:LISTED]) + more


def mismatch(what: str, path: Path, size: Size, picture: Size) -> Problem | None:
    """What is wrong with a companion of other proportions; a pixel of rounding in either is none."""
    tolerance = max(size.width + size.height, picture.width + picture.height)
    if abs(size.width * picture.height - size.height * picture.width) <= tolerance:
        return None
    why = f"{size.width} x {size.height}, the picture has {picture.width} x {picture.height}"
    return Problem(f"{what} has other proportions than its picture", shown(path), why, "make both the same size")


def mask_picture(mask: Companion, config: DatasetConfig) -> Image.Image:
    """The whole mask, grey. Raises DataError when the file is not the one that was scanned any more."""
    read = read_image(mask.path, max_pixels=config.max_pixels, background=BLACK)
    grey = read.alpha if mask.is_alpha else read.image.getchannel("R")
    if grey is None:
        raise DataError("picture changed during the run", where=shown(mask.path), fix="start the command again")
    return _same_size(grey, mask)


def read_mask(mask: Companion, placement: Placement, config: DatasetConfig) -> Tensor:
    """(1, H/8, W/8) in 0..1 of a crop, not mirrored. Raises DataError as `mask_picture`."""
    return loss_mask(mask_picture(mask, config), placement)


def read_condition(condition: Companion, placement: Placement, config: DatasetConfig, *, flipped: bool) -> Tensor:
    """(3, H, W) in [-1, 1]. Raises DataError when the file is not the one that was scanned any more."""
    image = read_image(condition.path, max_pixels=config.max_pixels, background=config.background).image
    chosen = filter_for(condition.size, placement.resized, config.interpolation)
    return pixels(_same_size(image, condition), PixelPlan(placement, chosen, flipped))


def _same_size(image: Image.Image, companion: Companion) -> Image.Image:
    if image.size != companion.size:
        raise DataError("picture changed during the run", where=shown(companion.path), fix="start the command again")
    return image
