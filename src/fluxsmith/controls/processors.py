"""Condition pictures made from photographs, by name: `processed("canny", photo)`. The names are those of DiffSynth-Studio's annotators.

Built in: canny, tile, blur, gray, low_quality; `none` and `inpaint` change nothing. The others are learned (controls/annotators.py).
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageFilter

from fluxsmith.controls.annotators import DETECTORS, PACKAGE, PIP, WEIGHTS, annotated, is_missing
from fluxsmith.controls.edges import edges
from fluxsmith.errors import ConfigError, Problem

UNCHANGED = ("none", "tile", "inpaint")
BUILT_IN = (*UNCHANGED, "canny", "blur", "gray", "low_quality")
ALIASES = {"pose": "openpose", "lq": "low_quality", "grey": "gray"}
NAMES = (*BUILT_IN, *DETECTORS)
BLUR = 1 / 100  # of the shorter side
COARSE = 8  # pixels of the original in one of low quality


def processed(
    name: str,
    image: Image.Image,
    *,
    thresholds: tuple[int, int] = (100, 200),
    weights: str | Path = WEIGHTS,
    device: torch.device | str = "cpu",
) -> Image.Image:
    """The condition picture, RGB, of the picture's size. `thresholds` are canny's. Raises ConfigError for an unknown name."""
    name, image = ALIASES.get(name, name), image.convert("RGB")
    if name in UNCHANGED:
        return image
    if name == "canny":
        return edges(image, *thresholds)
    if name == "gray":
        return image.convert("L").convert("RGB")
    if name == "blur":
        return image.filter(ImageFilter.GaussianBlur(min(image.size) * BLUR))
    if name == "low_quality":
        small = image.resize((max(1, image.width // COARSE), max(1, image.height // COARSE)), Image.Resampling.BICUBIC)
        return small.resize(image.size, Image.Resampling.BICUBIC)
    if name in DETECTORS:
        return annotated(name, image, weights, device)
    raise ConfigError(f"no processor is called {name}", fix=f"use one of {', '.join(NAMES)}")


def is_learned(name: str) -> bool:
    """Does a processor need controlnet_aux and weights of its own?"""
    return ALIASES.get(name, name) in DETECTORS


def processor_problems(name: str) -> Iterator[Problem]:
    """What keeps a processor from working, told before weights are read."""
    if is_learned(name) and is_missing():
        yield Problem(f"the processor {name} needs {PACKAGE}", fix=PIP)
