"""The door to insightface and facexlib: the largest face of a picture as a vector of 512 numbers of length one (ArcFace).

Neither package is a dependency of fluxsmith (facexlib brings torchvision); the vector can be given to InfiniteYou instead of a picture.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fluxsmith.errors import ConfigError, DataError

PACKAGES = ("insightface", "onnxruntime", "facexlib")
SIDES = (640, 320, 160)  # pictures are looked at in these sizes until a face is found
CROP = 112
PIP = "pip install insightface onnxruntime facexlib, with the torchvision made for your PyTorch; or give the face vector as `embedding`"


def missing_packages() -> tuple[str, ...]:
    """Which of the packages are not there."""
    return tuple(name for name in PACKAGES if find_spec(name) is None)


def face_vector(image: Image.Image, *, folder: str | Path, device: torch.device | str = "cpu") -> Tensor:
    """The vector (512,) of the largest face. `folder` holds insightface's `models/antelopev2`.

    Raises ConfigError if a package is missing, DataError if the picture shows no face.
    """
    missing = missing_packages()
    if missing:
        raise ConfigError(f"looking at a face needs {', '.join(missing)}", fix=PIP)
    crop = import_module("insightface.utils.face_align").norm_crop
    recognition = import_module("facexlib.recognition").init_recognition_model("arcface", device=str(device))
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    landmarks = np.asarray(largest(found_faces(bgr, folder))["kps"])
    face = torch.from_numpy(crop(bgr, landmark=landmarks, image_size=CROP)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        return recognition((face / 255 * 2 - 1).to(device))[0].float()


def found_faces(bgr: np.ndarray[Any, Any], folder: str | Path) -> Sequence[Any]:
    """The faces in a picture (H, W, 3), from the first size that shows any. Raises DataError if none does."""
    analysis = import_module("insightface.app").FaceAnalysis
    providers = import_module("onnxruntime").get_available_providers()
    detector = analysis(name="antelopev2", root=str(folder), allowed_modules=["detection"], providers=providers)
    for side in SIDES:
        detector.prepare(ctx_id=0, det_size=(side, side))
        faces = detector.get(bgr)
        if len(faces):
            return faces
    raise DataError("no face is found in the picture", fix="give a picture that shows one face clearly, from the front")


def largest(faces: Sequence[Any]) -> Any:
    """The face with the largest box."""
    return max(faces, key=lambda face: (face["bbox"][2] - face["bbox"][0]) * (face["bbox"][3] - face["bbox"][1]))
