"""Annotator: condition pictures for ControlNets, by the names that scripts use. Canny is built in, learned ones need controlnet_aux."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from fluxsmith.controls.processors import NAMES, processed
from fluxsmith.errors import ConfigError

HUB = "lllyasviel/Annotators"


def download_models(model_id_list: Sequence[str] = ()) -> None:
    """Older scripts prepare annotators so (`"Annotators:Depth"`): nothing to do, each brings its weights when it is first used.

    Raises ConfigError for other names.
    """
    for name in model_id_list:
        if not name.startswith("Annotators:"):
            fix = 'name its files: ModelConfig(model_id="...", origin_file_pattern="...")'
            raise ConfigError(f"there is no list of files for {name}", fix=fix)


class Annotator:
    """`Annotator("canny")(image)` -> a picture of the same size."""

    def __init__(
        self,
        processor_id: str,
        model_path: str | Path = "models/Annotators",
        detect_resolution: int | None = None,
        device: str | torch.device | None = None,
        skip_processor: bool = False,
    ) -> None:
        """`model_path`: folder with the weights of learned ones; where it is not there they come from Hugging Face.

        Raises ConfigError for an unknown name.
        """
        if processor_id not in NAMES:
            raise ConfigError(f"no annotator is called {processor_id}", fix=f"use one of {', '.join(NAMES)}")
        self.processor_id = "none" if skip_processor else processor_id
        self.weights = model_path if Path(model_path).is_dir() else HUB
        self.detect_resolution = detect_resolution
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def to(self, device: str | torch.device) -> None:
        """Work there from now on."""
        self.device = device

    def __call__(self, image: Image.Image, mask: Image.Image | None = None) -> Image.Image:
        """The condition picture; seen at `detect_resolution` pixels of the shorter side, if given."""
        seen = image
        if self.detect_resolution is not None:
            factor = self.detect_resolution / min(image.size)
            seen = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
        return processed(self.processor_id, seen, weights=self.weights, device=self.device).resize(image.size)
