"""The parameters of a call, in the order and with the defaults that scripts rely on, and what is wrong with them at first sight.

`Call("a cat", seed=0).problems()`; `taking(Call)` gives a method these parameters as its own.
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from fluxsmith.dialects.diffsynth.model_config import ControlNetInput, ModelConfig
from fluxsmith.errors import ConfigError, Problem

CELL = 8  # pixels: their tile numbers count latent cells
MULTIPLE = 16
P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")
Options = TypeVar("Options")

Picture = Image.Image
Lora = ModelConfig | str


@dataclass
class Call:
    """One picture."""

    prompt: str = ""
    negative_prompt: str = ""
    cfg_scale: float = 1.0
    embedded_guidance: float = 3.5
    t5_sequence_length: int = 512
    input_image: Picture | None = None
    denoising_strength: float = 1.0
    height: int = 1024
    width: int = 1024
    seed: int | None = None
    rand_device: str | torch.device = "cpu"
    sigma_shift: float | None = None
    num_inference_steps: int = 30
    kontext_images: Sequence[Picture] | Picture | None = None
    controlnet_inputs: Sequence[ControlNetInput] | None = None
    ipadapter_images: Sequence[Picture] | Picture | None = None
    ipadapter_scale: float = 1.0
    eligen_entity_prompts: Sequence[str] | None = None
    eligen_entity_masks: Sequence[Picture] | None = None
    eligen_enable_on_negative: bool = False
    eligen_enable_inpaint: bool = False
    infinityou_id_image: Picture | None = None
    infinityou_guidance: float = 1.0
    flex_inpaint_image: Picture | None = None
    flex_inpaint_mask: Picture | None = None
    flex_control_image: Picture | None = None
    flex_control_strength: float = 0.5
    flex_control_stop: float = 0.5
    value_controller_inputs: Sequence[float] | float | None = None
    step1x_reference_image: Picture | None = None
    nexus_gen_reference_image: Picture | None = None
    lora_encoder_inputs: Sequence[Lora] | Lora | None = None
    lora_encoder_scale: float = 1.0
    flux_fill_image: Picture | None = None
    flux_fill_mask: Picture | None = None
    flux_redux_image: Picture | None = None
    insert_anything_source_image: Picture | None = None
    insert_anything_source_mask: Picture | None = None
    insert_anything_ref_image: Picture | None = None
    insert_anything_ref_mask: Picture | None = None
    tea_cache_l1_thresh: float | None = None
    tiled: bool = False
    tile_size: int = 128
    tile_stride: int = 64
    progress_bar_cmd: Callable[..., Iterable[Any]] = tqdm
    multidiffusion_prompts: Sequence[str] = ()
    multidiffusion_masks: Sequence[Picture] = ()
    multidiffusion_scales: Sequence[float] = ()
    denoise_tile: int | None = None
    """Side in pixels of a window that is denoised by itself; None denoises the picture as a whole."""
    denoise_overlap: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, rounded up to multiples of 16."""
        return -(-self.width // MULTIPLE) * MULTIPLE, -(-self.height // MULTIPLE) * MULTIPLE

    @property
    def tiles(self) -> tuple[int, int]:
        """Side and overlap of the autoencoder's tiles in pixels; side 0 means one piece."""
        return (self.tile_size * CELL, (self.tile_size - self.tile_stride) * CELL) if self.tiled else (0, 0)

    def problems(self) -> Iterator[Problem]:
        """What cannot be drawn; the pictures of controls are looked at by the controls."""
        if not isinstance(self.prompt, str) or not isinstance(self.negative_prompt, str):
            yield Problem("the prompt is not a text", why="a call draws one picture", fix="call the pipeline once for each prompt")
        if min(self.width, self.height) < 1:
            yield Problem(f"a picture of {self.width} x {self.height} pixels", fix="use 1024 x 1024")
        if self.t5_sequence_length < 1:
            yield Problem(f"t5_sequence_length = {self.t5_sequence_length}", fix="use 512")
        yield from self._tile_problems()
        image, (width, height) = self.input_image, self.size
        if image is not None and image.size != (width, height):
            what = f"input_image has {image.width} x {image.height} pixels and the picture {width} x {height}"
            fix = f"pass width={image.width}, height={image.height}, or input_image.resize(({width}, {height}))"
            yield Problem(what, why="input_image is used at its own size", fix=fix)
        if image is None and self.denoising_strength < 1:
            yield Problem("denoising_strength without input_image", fix="pass input_image, or leave denoising_strength out")
        if self.multidiffusion_prompts or self.multidiffusion_masks or self.multidiffusion_scales:
            fix = "use eligen_entity_prompts and eligen_entity_masks, with the EliGen LoRA"
            yield Problem("multidiffusion is not there", why="it never had an effect on FLUX in the pipelines that had the option", fix=fix)

    def _tile_problems(self) -> Iterator[Problem]:
        if self.tiled and not 0 < self.tile_stride <= self.tile_size:
            what = f"tile_size = {self.tile_size}, tile_stride = {self.tile_stride}"
            yield Problem(what, why="tiles must advance, and must not leave gaps", fix="use tile_size=128, tile_stride=64")


def taking(options: Callable[P, Options]) -> Callable[[Callable[[S, Options], R]], Callable[Concatenate[S, P], R]]:
    """For a method with one argument, an options object: it is called with that object's fields instead."""
    known = inspect.signature(options)

    def wrap(method: Callable[[S, Options], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def call(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
            unknown = next((name for name in kwargs if name not in known.parameters), None)
            if unknown is not None:
                near = difflib.get_close_matches(unknown, known.parameters, n=1)
                raise ConfigError(f"there is no parameter {unknown}", fix=f"did you mean {near[0]}?" if near else "leave it out")
            return method(self, options(*args, **kwargs))

        first = next(iter(inspect.signature(method).parameters.values()))
        call.__dict__["__signature__"] = known.replace(
            parameters=[first, *known.parameters.values()], return_annotation=inspect.Signature.empty
        )
        return call

    return wrap


def given(call: Call, names: Iterable[str]) -> list[str]:
    """Those of these parameters that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(Call)}
    return [name for name in names if getattr(call, name) is not defaults[name]]
