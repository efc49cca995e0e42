"""From the parameters of a call to controls: one row of MAKERS for each parameter that brings a control with it.

A row says which of the loaded controls it needs, what to load where it is not there, and what a copy of it is given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fluxsmith.controls.base import Control
from fluxsmith.dialects.diffsynth.call import Call
from fluxsmith.dialects.diffsynth.model_config import ControlNetInput, ModelConfig
from fluxsmith.errors import ConfigError, Problem

Loaded = Mapping[str, Sequence[Control]]
Options = dict[str, Any]
Copies = Iterator[tuple[Control, Options]]

MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "openpose": 4, "gray": 5, "lq": 6}


class Maker(NamedTuple):
    """Parameters that bring a control: the control, an example of its file, and what each copy of it is given."""

    parameters: tuple[str, ...]
    control: str
    file: str
    copies: Callable[[Call, Loaded], Copies]
    is_always_on: bool = False
    """A model that has this control cannot be called without it."""


def controls_of(call: Call, loaded: Loaded) -> list[Control]:
    """The controls of a call with its pictures. Raises one ConfigError with every parameter whose model is not loaded."""
    made, problems = list[Control](), list[Problem]()
    for maker in MAKERS:
        given = [name for name in maker.parameters if getattr(call, name) not in (None, [], ())]
        if not given and not (maker.is_always_on and loaded.get(maker.control)):
            continue
        if not loaded.get(maker.control):
            fix = f"add ModelConfig(...) of {maker.file} to model_configs"
            problems.append(Problem(f"{given[0]} needs a model that is not loaded", fix=fix))
            continue
        try:
            made += copies(call, loaded, maker)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(str(problems[0]), problems=tuple(problems))
    return made


def copies(call: Call, loaded: Loaded, maker: Maker) -> list[Control]:
    """Copies of the loaded controls with what the call gives. Raises ConfigError for values that they cannot take."""
    made = []
    for number, (control, options) in enumerate(maker.copies(call, loaded)):
        try:
            made.append(control.given(name=maker.control if not number else f"{maker.control}-{number + 1}", **options))
        except ConfigError as error:
            found = [replace(problem, where=maker.parameters[0]) for problem in error.problems]
            raise ConfigError(str(found[0]), problems=tuple(found)) from error
    return made


def several(value: Any) -> list[Any]:
    """One thing or a list of them, as a list."""
    return [*value] if isinstance(value, list | tuple) else [value]


def _kontext(call: Call, loaded: Loaded) -> Copies:
    yield loaded["kontext"][0], {"images": several(call.kontext_images)}


def _controlnets(call: Call, loaded: Loaded) -> Copies:
    for given, control in _inputs(call, loaded):
        if call.infinityou_id_image is None or not _is_infuse(control, loaded):
            options = _span(given) | {"image": given.image, "mask": given.inpaint_mask}
            yield control, options | ({"mode": _mode(given)} if control.net.control.modes else {})


def _inputs(call: Call, loaded: Loaded) -> Iterator[tuple[ControlNetInput, Any]]:
    """Every input with its ControlNet."""
    there = loaded["controlnet"]
    for given in several(call.controlnet_inputs or ()):
        if not 0 <= given.controlnet_id < len(there):
            what = f"controlnet_id = {given.controlnet_id}, and {len(there)} ControlNets are loaded"
            raise ConfigError(what, why="they are numbered from 0 in the order of model_configs", fix="correct the number")
        yield given, there[given.controlnet_id]


def _is_infuse(control: Any, loaded: Loaded) -> bool:
    """Is this ControlNet InfiniteYou's?"""
    return any(net is control.net for one in loaded.get("infiniteyou", ()) for net in one.nets)


def _span(given: ControlNetInput) -> Options:
    """Strength and when it acts: their progress falls from 1 to 0, ours rises."""
    return {"scale": given.scale, "start": 1 - given.start, "end": 1 - given.end}


def _mode(given: ControlNetInput) -> int:
    if given.processor_id not in MODES:
        why = f"processor_id is {given.processor_id!r}, and this ControlNet must know what kind of picture it sees"
        raise ConfigError("a ControlNetInput names no known processor", why=why, fix=f"use one of {', '.join(MODES)}")
    return MODES[given.processor_id]


def _infiniteyou(call: Call, loaded: Loaded) -> Copies:
    """One for each input of its ControlNet, which then reads the person; without an input it sees a black picture."""
    face = {"face": call.infinityou_id_image, "guidance": call.infinityou_guidance}
    own = [given for given, control in _inputs(call, loaded) if _is_infuse(control, loaded)]
    for given in own or [ControlNetInput()]:
        yield loaded["infiniteyou"][0], face | _span(given) | {"image": given.image}


def _ip_adapter(call: Call, loaded: Loaded) -> Copies:
    yield loaded["ip_adapter"][0], {"images": several(call.ipadapter_images), "scale": call.ipadapter_scale}


def _step1x(call: Call, loaded: Loaded) -> Copies:
    yield loaded["step1x"][0], {"image": call.step1x_reference_image}


def _nexus_gen(call: Call, loaded: Loaded) -> Copies:
    yield loaded["nexus_gen"][0], {"image": call.nexus_gen_reference_image}


def _eligen(call: Call, loaded: Loaded) -> Copies:
    prompts, masks = several(call.eligen_entity_prompts), several(call.eligen_entity_masks or ())
    if len(prompts) != len(masks):
        what = f"{len(prompts)} eligen_entity_prompts and {len(masks)} eligen_entity_masks"
        raise ConfigError(what, why="every entity has a prompt and a mask", fix="give as many masks as prompts")
    entities = [{"prompt": prompt, "mask": mask} for prompt, mask in zip(prompts, masks, strict=True)]
    on_negative = call.eligen_enable_on_negative and call.cfg_scale != 1
    yield loaded["eligen"][0], {"entities": entities, "on_negative": on_negative, "inpaint": call.eligen_enable_inpaint, "fit": "stretch"}


def _flex(call: Call, loaded: Loaded) -> Copies:
    yield (
        loaded["flex2"][0],
        {
            "image": call.flex_inpaint_image,
            "mask": call.flex_inpaint_mask,
            "control_image": call.flex_control_image,
            "strength": call.flex_control_strength,
            "stop": call.flex_control_stop,
        },
    )


def _values(call: Call, loaded: Loaded) -> Copies:
    values, there = several(call.value_controller_inputs), loaded["value"]
    if len(values) > len(there):
        what = f"{len(values)} value_controller_inputs, and {len(there)} value controllers are loaded"
        raise ConfigError(what, why="values belong to them in the order of model_configs", fix="give as many values as there are")
    for control, value in zip(there, values, strict=False):
        yield control, {"value": float(value)}


def _lora_encoder(call: Call, loaded: Loaded) -> Copies:
    paths = [str(path) for one in several(call.lora_encoder_inputs) for path in lora_files(one)]
    yield loaded["lora_encoder"][0], {"loras": paths, "scale": call.lora_encoder_scale}


def lora_files(given: ModelConfig | str | Path) -> list[Path]:
    """The files of a LoRA that is named by a path or a ModelConfig."""
    return given.weights() if isinstance(given, ModelConfig) else ModelConfig(path=given).weights()


def _fill(call: Call, loaded: Loaded) -> Copies:
    yield loaded["fill"][0], {"image": call.flux_fill_image, "mask": call.flux_fill_mask, "fit": "stretch"}


def _redux(call: Call, loaded: Loaded) -> Copies:
    yield loaded["redux"][0], {"images": several(call.flux_redux_image)}


MAKERS = (
    Maker(("kontext_images",), "kontext", "FLUX.1-Kontext-dev", _kontext),
    Maker(("infinityou_id_image",), "infiniteyou", "InfiniteYou (InfuseNetModel and image_proj_model.bin)", _infiniteyou),
    Maker(("controlnet_inputs",), "controlnet", "a ControlNet", _controlnets),
    Maker(("ipadapter_images",), "ip_adapter", "FLUX.1-dev-IP-Adapter (ip-adapter.bin) and of its image encoder", _ip_adapter),
    Maker(("eligen_entity_prompts",), "eligen", "T5 (text_encoder_2/*.safetensors)", _eligen),
    Maker(
        ("nexus_gen_reference_image",), "nexus_gen", "Nexus-GenV2 (model*.safetensors and edit_decoder.bin)", _nexus_gen, is_always_on=True
    ),
    Maker(
        ("flex_inpaint_image", "flex_inpaint_mask", "flex_control_image"), "flex2", "Flex.2-preview.safetensors", _flex, is_always_on=True
    ),
    Maker(("step1x_reference_image",), "step1x", "Step1X-Edit (step1x-edit-i1258.safetensors)", _step1x, is_always_on=True),
    Maker(("flux_redux_image",), "redux", "FLUX.1-Redux-dev (image_encoder and image_embedder)", _redux),
    Maker(("flux_fill_image", "flux_fill_mask"), "fill", "flux1-fill-dev.safetensors", _fill, is_always_on=True),
    Maker(("value_controller_inputs",), "value", "AttriCtrl-FLUX.1-Dev (models/brightness.safetensors)", _values),
    Maker(("lora_encoder_inputs",), "lora_encoder", "LoRA-Encoder-FLUX.1-Dev (model.safetensors)", _lora_encoder),
)
