"""What sd-scripts, SimpleTuner and DiffSynth-Studio call a kind of quantisation, and what it is here.

`options_of("int8-quanto", "simpletuner")` is `{"type": "int8", "compute": "weight_only"}`; `None` means no quantisation. A name that
has no equal raises ConfigError with the nearest kind.
"""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from fluxsmith.errors import ConfigError

WEIGHT_ONLY, DYNAMIC = {"compute": "weight_only"}, {"compute": "dynamic"}
Options = dict[str, Any]


class Named(NamedTuple):
    """One name of another system: our options, and what is different here."""

    options: Options | None
    note: str = ""


class Without(NamedTuple):
    """A name whose kind does not exist here: what comes nearest."""

    nearest: str


OWN_SCALES = "row scales are kept, so that small weights are not flushed to zero"
NOT_ACTIVATIONS = "activations stay in their own type"
SD_SCRIPTS: Mapping[str, Named | Without] = {
    "fp8_base": Named({"type": "fp8", **WEIGHT_ONLY, "text_encoders": True}, OWN_SCALES),
    "fp8_base_unet": Named({"type": "fp8", **WEIGHT_ONLY}, OWN_SCALES),
}
SIMPLETUNER: Mapping[str, Named | Without] = {
    "no_change": Named(None),
    "int8-quanto": Named({"type": "int8", **WEIGHT_ONLY}),
    "int4-quanto": Named({"type": "int4"}),
    "int2-quanto": Named({"type": "int2"}),
    "fp8-quanto": Named({"type": "fp8", **WEIGHT_ONLY}),
    "fp8uz-quanto": Named({"type": "fp8", **WEIGHT_ONLY}, "e4m3fn is used on every card"),
    "int8-torchao": Named({"type": "int8", **WEIGHT_ONLY}),
    "int8dq-torchao": Named({"type": "int8", **DYNAMIC}),
    "int4-torchao": Named({"type": "int4"}),
    "int8dq-int4-torchao": Named({"type": "int4"}, NOT_ACTIVATIONS),
    "fp8-torchao": Named({"type": "fp8", "compute": "auto"}),
    "fp8wo-torchao": Named({"type": "fp8", **WEIGHT_ONLY}),
    "fp8-int4-torchao": Named({"type": "int4"}, NOT_ACTIVATIONS),
    "fp8-native": Named({"type": "fp8", **DYNAMIC}),
    "fp8-transformerengine": Named({"type": "fp8", **DYNAMIC}),
    "nf4-bnb": Named({"type": "nf4"}),
    "int8-sdnq": Named({"type": "int8", **WEIGHT_ONLY}),
    "uint8-sdnq": Named({"type": "int8", **WEIGHT_ONLY}, "signed"),
    "fp8-sdnq": Named({"type": "fp8", **WEIGHT_ONLY}),
    "uint4-sdnq": Named({"type": "int4"}),
    "uint2-sdnq": Named({"type": "int2"}),
    "int6-sdnq": Without("int8"),
    "int5-sdnq": Without("int8"),
    "uint5-sdnq": Without("int8"),
    "uint3-sdnq": Without("int4"),
    "int16-sdnq": Without("no_change"),
    "uint16-sdnq": Without("no_change"),
    "fp16-sdnq": Without("no_change"),
}
DIFFSYNTH: Mapping[str, Named | Without] = {
    "float8_e4m3fn": Named({"type": "fp8", **WEIGHT_ONLY}, OWN_SCALES),
    "fp8_models": Named({"type": "fp8", **WEIGHT_ONLY}, OWN_SCALES),
    "bitsandbytes_nf4": Named({"type": "nf4"}),
    "bitsandbytes_fp4": Without("nf4"),
    "torchao_int8_w8a16": Named({"type": "int8", **WEIGHT_ONLY}),
    "torchao_fp8_w8a16": Named({"type": "fp8", **WEIGHT_ONLY}),
    "torchao_int4_w4a16": Named({"type": "int4"}),
    "torchao_int8_w8a8": Named({"type": "int8", **DYNAMIC}),
    "torchao_fp8_w8a8": Named({"type": "fp8", **DYNAMIC}),
    "torchao_int4_w4a8": Named({"type": "int4"}, NOT_ACTIVATIONS),
    "torchao_nvfp4_w4a16": Without("nf4"),
    "torchao_nvfp4_w4a4": Without("nf4"),
    "torchao_mxfp4_w4a4": Without("nf4"),
    "torchao_mxfp8_w8a8": Without("fp8"),
    "comfy_kitchen_int8_w8a8": Named({"type": "int8", **DYNAMIC}),
    "comfy_kitchen_fp8_w8a8": Named({"type": "fp8", **DYNAMIC}),
}
SYSTEMS: Mapping[str, Mapping[str, Named | Without]] = {"sd-scripts": SD_SCRIPTS, "simpletuner": SIMPLETUNER, "diffsynth": DIFFSYNTH}


def named(name: str, system: str) -> Named:
    """What a name of a system is here. Raises ConfigError for one that is unknown, or that has no equal."""
    table = SYSTEMS[system]
    found = table.get(name)
    if isinstance(found, Named):
        return found
    if found is not None:
        raise ConfigError(f"{name} has no equal", fix=f"use {found.nearest}, which comes nearest")
    close = difflib.get_close_matches(name, table, 1, 0.6)
    raise ConfigError(f"{system} has no precision {name!r}", fix=f"write {close[0]}" if close else f"use one of {', '.join(table)}")


def options_of(name: str, system: str) -> Options | None:
    """The `[quant]` section that a name stands for; None for no quantisation."""
    found = named(name, system).options
    return None if found is None else dict(found)


def with_encoders(transformer: str, encoders: Mapping[str, str], system: str) -> Options | None:
    """The section for a transformer and text encoders (`clip_l`, `t5xxl`) that each have a name. None if nothing is quantised."""
    own = options_of(transformer, system)
    kinds = {role: found["type"] for role, name in encoders.items() if (found := options_of(name, system)) is not None}
    if not kinds:
        return own
    return {**(own or {"type": "none"}), "text_encoders": kinds}
