"""DiffSynth-Studio's FLUX pipeline: change one import, and a script runs.

`from fluxsmith.dialects.diffsynth import FluxImagePipeline, ModelConfig, ControlNetInput` in place of
`from diffsynth.pipelines.flux_image import ...` (or `flux_image_new`).
"""

from fluxsmith.dialects.diffsynth.annotator import Annotator, download_models
from fluxsmith.dialects.diffsynth.held import load_state_dict
from fluxsmith.dialects.diffsynth.model_config import ControlNetInput, ModelConfig, download_customized_models
from fluxsmith.dialects.diffsynth.pipeline import FluxImagePipeline

__all__ = [
    "Annotator",
    "ControlNetInput",
    "FluxImagePipeline",
    "ModelConfig",
    "download_customized_models",
    "download_models",
    "load_state_dict",
]
