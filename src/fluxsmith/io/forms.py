"""Weights stored in fewer bits: which tensors of a file stand for which weight, from names, types and shapes alone; no torch here.

`plain, stored = logical(infos)`: `plain` lists the weights as what they stand for (F32), `stored` says of which tensors each is made.
Forms: `scaled` (8-bit values times scales: ComfyUI's, sd-scripts' and ours), our `int4`, `int2`, `nf4` (docs/reference/model-files.md),
and GGUF's by their names.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from fluxsmith.io.gguf_header import QUANTISED
from fluxsmith.io.header import TensorInfo

SCALE = re.compile(r"(?P<layer>.+)\.(?:scale_weight|weight_scale)$")
BESIDE = re.compile(r"(?:^|\.)(?:scaled_fp8|scale_input|input_scale|comfy_quant)$")  # how activations are to be quantised
PACKED = re.compile(r"(?P<layer>.+)\.weight_(?P<form>int4|int2|nf4)$")
PARTS = {"int4": ("scale", "offset"), "int2": ("scale", "offset"), "nf4": ("absmax", "nested", "offset")}
PER_BYTE = {"int4": 2, "int2": 4, "nf4": 2}
VALUES = ("F8_E4M3", "F8_E5M2", "I8", "F16", "BF16", "F32")
SCALES = ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32")
NF4_BLOCK, NF4_NESTED = 64, 256  # weights under one largest value, and largest values under one scale


class Stored(NamedTuple):
    """How one weight is stored: part -> tensor of the file; the values themselves are the part ""."""

    form: str
    parts: dict[str, str]
    shape: tuple[int, ...]


def logical(infos: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, Stored]]:
    """The table of what is stood for, and how. Files with a scale of an unknown form (NVFP4, ...) are left as they are."""
    found = _scaled(infos) | _packed(infos) | _gguf(infos)
    if not found:
        return dict(infos), {}
    used = {name for stored in found.values() for name in stored.parts.values()}
    gone = used | {name for name in infos if BESIDE.search(name)}
    plain: dict[str, TensorInfo] = {}
    places = {stored.parts[""]: weight for weight, stored in found.items()}
    for name, info in infos.items():
        if name in places:
            plain[places[name]] = info._replace(dtype="F32", shape=found[places[name]].shape)
        elif name not in gone:
            plain[name] = info
    return plain, found


def _scaled(infos: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name in infos:
        match = SCALE.match(name)
        if match:
            weight = f"{match['layer']}.weight"
            is_turned = weight in infos and infos[weight].dtype == "I8" and f"{match['layer']}.comfy_quant" in infos
            if weight not in infos or is_turned or not _fits(infos[weight], infos[name]):  # its integers may be of rotated weights
                return {}
            found[weight] = Stored("scaled", {"": weight, "scale": name}, infos[weight].shape)
    return found


def _fits(weight: TensorInfo, scale: TensorInfo) -> bool:
    if weight.dtype not in VALUES or scale.dtype not in SCALES or not weight.shape:
        return False
    if scale.elements == 1 or scale.shape in (weight.shape[:1], (weight.shape[0], 1)):
        return True
    is_blocks = len(scale.shape) == 3 and len(weight.shape) == 2 and scale.shape[0] == weight.shape[0] and scale.shape[2] == 1
    return is_blocks and scale.shape[1] > 0 and weight.shape[1] % scale.shape[1] == 0


def _packed(infos: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, info in infos.items():
        match = PACKED.match(name)
        if match:
            form = match["form"]
            parts = {part: f"{name}_{part}" for part in PARTS[form]}
            if len(info.shape) == 2 and info.dtype == "U8" and all(part in infos for part in parts.values()):
                shape = (info.shape[0], info.shape[1] * PER_BYTE[form])
                if _sizes_fit(form, shape, {part: infos[given].shape for part, given in parts.items()}):
                    found[f"{match['layer']}.weight"] = Stored(form, {"": name, **parts}, shape)
    return found


def _gguf(infos: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    return {name: Stored(info.dtype, {"": name}, info.shape) for name, info in infos.items() if info.dtype in QUANTISED}


def _sizes_fit(form: str, shape: tuple[int, int], parts: Mapping[str, tuple[int, ...]]) -> bool:
    if form == "nf4":
        blocks = -(-shape[0] * shape[1] // NF4_BLOCK)
        return parts == {"absmax": (blocks,), "nested": (-(-blocks // NF4_NESTED),), "offset": (1,)}
    groups = parts["scale"][-1] if len(parts["scale"]) == 2 else 0
    return groups > 0 and shape[1] % groups == 0 and parts["scale"] == parts["offset"] == (shape[0], groups)


def names_of(weight: str, form: str) -> dict[str, str]:
    """Part -> name in a file that we write, for a weight `....weight` in a form: fp8, int8, int4, int2, nf4."""
    if form in ("fp8", "int8"):
        return {"": weight, "scale": f"{weight}_scale"}
    return {"": f"{weight}_{form}", **{part: f"{weight}_{form}_{part}" for part in PARTS[form]}}
