"""The door to controlnet_aux: learned annotators (depth, soft edges, lines, poses, normals) that make condition pictures.

The package is not a dependency of fluxsmith: it brings torchvision, OpenCV and timm, in versions that must fit your PyTorch.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from fluxsmith.errors import ConfigError

DETECTORS = {  # our name -> class of controlnet_aux
    "depth": "MidasDetector",
    "softedge": "HEDdetector",
    "lineart": "LineartDetector",
    "lineart_anime": "LineartAnimeDetector",
    "openpose": "OpenposeDetector",
    "normal": "NormalBaeDetector",
}
WEIGHTS = "lllyasviel/Annotators"
PACKAGE = "controlnet_aux"
PIP = f"pip install {PACKAGE}, with the torchvision made for your PyTorch; or give a condition picture that is ready"


def is_missing() -> bool:
    """Is controlnet_aux not there?"""
    return find_spec(PACKAGE) is None


def annotated(name: str, image: Image.Image, weights: str | Path = WEIGHTS, device: torch.device | str = "cpu") -> Image.Image:
    """What an annotator of DETECTORS sees in a picture, of the picture's size. Raises ConfigError if controlnet_aux is missing.

    `weights` is a folder with the annotators' files, or an id at Hugging Face; they are read anew for every picture.
    """
    try:
        library = import_module(PACKAGE)
    except ImportError as error:  # also where something that it needs is missing
        raise ConfigError(f"the annotator {name} needs {PACKAGE}", why=str(error), fix=PIP) from error
    detector = getattr(library, DETECTORS[name]).from_pretrained(str(weights)).to(device)
    options = {"include_hand": True, "include_face": True} if name == "openpose" else {}
    side = min(image.size)
    found = detector(image.convert("RGB"), detect_resolution=side, image_resolution=side, output_type="pil", **options)
    return found.convert("RGB").resize(image.size)
