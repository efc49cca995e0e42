"""From the parameters of a call to controls: one row of MAKERS for each parameter that brings a control with it.

A row says which of the loaded controls it needs, what to load where it is not there, and what a copy of it is given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from fluxsmith.controls.base import Control
from fluxsmith.dialects.diffsynth.call import Call
from fluxsmith.dialects.diffsynth.model_config import ControlNetInput, ModelConfig
from fluxsmith.errors import ConfigError, Problem

Templates = Sequence[Control]
Options = dict[str, Any]

MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "openpose": 4, "gray": 5, "lq": 6}


class Maker(NamedTuple):
    """Parameters that bring a control: the control, an example of its file, and what each copy of it is given."""

    parameters: tuple[str, ...]
    control: str
    file: str
    copies: Callable[[Call, Templates], Iterator[tuple[Control, Options]]]


def controls_of(call: Call, loaded: Mapping[str, Templates]) -> list[Control]:
    """The controls of a call with its pictures. Raises one ConfigError with every parameter whose model is not loaded."""
    made, problems = list[Control](), list[Problem]()
    for maker in MAKERS:
        given = [name for name in maker.parameters if getattr(call, name) is not None]
        if not given:
            continue
        there = loaded.get(maker.control)
        if not there:
            fix = f"add ModelConfig(...) of {maker.file} to model_configs"
            problems.append(Problem(f"{given[0]} needs a model that is not loaded", fix=fix))
            continue
        try:
            made += copies(call, there, maker)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(str(problems[0]), problems=tuple(problems))
    types = {control.config.type for control in made}
    return made + [one for name in ("fill", "flex2") if name not in types for one in loaded.get(name, ())]


def copies(call: Call, there: Templates, maker: Maker) -> list[Control]:
    """Copies of the loaded controls with what the call gives. Raises ConfigError for values that they cannot take."""
    made = []
    for number, (control, options) in enumerate(maker.copies(call, there)):
        try:
            made.append(control.given(name=maker.control if not number else f"{maker.control}-{number + 1}", **options))
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{maker.parameters[0]}: {option}: {first['msg']}", fix="correct the value") from None
    return made


def several(value: Any) -> list[Any]:
    """One thing or a list of them, as a list."""
    return [*value] if isinstance(value, list | tuple) else [value]


def _kontext(call: Call, there: Templates) -> Iterator[tuple[Control, Options]]:
    yield there[0], {"images": several(call.kontext_images)}


def _controlnets(call: Call, there: Templates) -> Iterator[tuple[Control, Options]]:
    for given in several(call.controlnet_inputs):
        if not 0 <= given.controlnet_id < len(there):
            what = f"controlnet_id = {given.controlnet_id}, and {len(there)} ControlNets are loaded"
            raise ConfigError(what, why="they are numbered from 0 in the order of model_configs", fix="correct the number")
        control: Any = there[given.controlnet_id]
        yield control, _controlnet(given, control)


def _controlnet(given: ControlNetInput, control: Any) -> Options:
    options: Options = {"image": given.image, "scale": given.scale}
    if control.net.control.modes:
        if given.processor_id not in MODES:
            why = f"processor_id is {given.processor_id!r}, and this ControlNet must know what kind of picture it sees"
            raise ConfigError("a ControlNetInput names no known processor", why=why, fix=f"use one of {', '.join(MODES)}")
        options["mode"] = MODES[given.processor_id or ""]
    return options


def _eligen(call: Call, there: Templates) -> Iterator[tuple[Control, Options]]:
    prompts, masks = several(call.eligen_entity_prompts), several(call.eligen_entity_masks or ())
    if len(prompts) != len(masks):
        what = f"{len(prompts)} eligen_entity_prompts and {len(masks)} eligen_entity_masks"
        raise ConfigError(what, why="every entity has a prompt and a mask", fix="give as many masks as prompts")
    entities = [{"prompt": prompt, "mask": mask} for prompt, mask in zip(prompts, masks, strict=True)]
    on_negative = call.eligen_enable_on_negative and call.cfg_scale != 1
    yield there[0], {"entities": entities, "on_negative": on_negative, "inpaint": call.eligen_enable_inpaint, "fit": "stretch"}


def _flex(call: Call, there: Templates) -> Iterator[tuple[Control, Options]]:
    yield (
        there[0],
        {
            "image": call.flex_inpaint_image,
            "mask": call.flex_inpaint_mask,
            "control_image": call.flex_control_image,
            "strength": call.flex_control_strength,
            "stop": call.flex_control_stop,
        },
    )


def _values(call: Call, there: Templates) -> Iterator[tuple[Control, Options]]:
    values = several(call.value_controller_inputs)
    if len(values) > len(there):
        what = f"{len(values)} value_controller_inputs, and {len(there)} value controllers are loaded"
        raise ConfigError(what, why="values belong to them in the order of model_configs", fix="give as many values as there are")
    for control, value in zip(there, values, strict=False):
        yield control, {"value": float(value)}


def _lora_encoder(call: Call, there: Templates) -> Iterator[tuple[Control, Options]]:
    paths = [str(path) for one in several(call.lora_encoder_inputs) for path in lora_files(one)]
    yield there[0], {"loras": paths, "scale": call.lora_encoder_scale}


def lora_files(given: ModelConfig | str | Path) -> list[Path]:
    """The files of a LoRA that is named by a path or a ModelConfig."""
    return given.weights() if isinstance(given, ModelConfig) else ModelConfig(path=given).weights()


def _fill(call: Call, there: Templates) -> Iterator[tuple[Control, Options]]:
    yield there[0], {"image": call.flux_fill_image, "mask": call.flux_fill_mask, "fit": "stretch"}


def _redux(call: Call, there: Templates) -> Iterator[tuple[Control, Options]]:
    yield there[0], {"images": several(call.flux_redux_image)}


MAKERS = (
    Maker(("kontext_images",), "kontext", "FLUX.1-Kontext-dev", _kontext),
    Maker(("controlnet_inputs",), "controlnet", "a ControlNet", _controlnets),
    Maker(("eligen_entity_prompts",), "eligen", "T5 (text_encoder_2/*.safetensors)", _eligen),
    Maker(("flex_inpaint_image", "flex_inpaint_mask", "flex_control_image"), "flex2", "Flex.2-preview.safetensors", _flex),
    Maker(("flux_fill_image", "flux_fill_mask"), "fill", "flux1-fill-dev.safetensors", _fill),
    Maker(("flux_redux_image",), "redux", "FLUX.1-Redux-dev (image_encoder and image_embedder)", _redux),
    Maker(("value_controller_inputs",), "value", "AttriCtrl-FLUX.1-Dev (models/brightness.safetensors)", _values),
    Maker(("lora_encoder_inputs",), "lora_encoder", "LoRA-Encoder-FLUX.1-Dev (model.safetensors)", _lora_encoder),
)
