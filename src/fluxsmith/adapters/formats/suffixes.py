"""The endings of adapter keys: which kind of adapter and which of its tensors a key is, and how each is written.

`split("x.lora_A.default.weight")` is Ending("x", "lora", "down"); `keys(part, "x", "down_up")` is {"x.lora_down.weight": ...}.
"""

import re
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fluxsmith.adapters.formats.state import Part
from fluxsmith.errors import ModelFileError

Style = Literal["down_up", "a_b", "a_b_default"]
ENDING = re.compile(
    r"\.(?:lora_(?P<half>A|B|down|up)(?:\.(?!weight$|bias$)[\w-]+)?\.weight|lora\.(?P<old>down|up)\.weight"
    r"|(?P<bias>lora_B(?:\.(?!weight$|bias$)[\w-]+)?\.bias|diff_b)|(?P<alpha>alpha)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.[\w-]+)*)"
    r"|lokr_(?P<lokr>w[12](?:_[ab])?)|hada_(?P<loha>w[12]_[ab])|(?P<glora>[ab][12])\.weight|(?P<full>diff)"
    r"|oft_blocks(?:\.(?P<split>\d+))?|(?P<rescale>rescale)|(?P<on_input>on_input)|(?P<scalar>scalar)"
    r"|(?P<convolution>lora_mid\.weight|lokr_t2|hada_t[12]|bm\.weight)|(?P<weight>weight))$"
)
HALVES = {"A": "down", "down": "down", "B": "up", "up": "up"}
WRITTEN = {  # kind -> tensor -> ending, in LyCORIS' words; LoRA's two are a matter of style
    "lokr": {name: f".lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    "loha": {name: f".hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "glora": {name: f".{name}.weight" for name in ("a1", "a2", "b1", "b2")},
    "full": {"diff": ".diff"},
    "ia3": {"weight": ".weight", "on_input": ".on_input"},
    "diag_oft": {"blocks": ".oft_blocks", "rescale": ".rescale"},
    "boft": {"blocks": ".oft_blocks", "rescale": ".rescale"},
}
STYLES: dict[Style, dict[str, str]] = {
    "down_up": {"down": ".lora_down.weight", "up": ".lora_up.weight", "bias": ".diff_b", "magnitude": ".dora_scale"},
    "a_b": {"down": ".lora_A.weight", "up": ".lora_B.weight", "bias": ".lora_B.bias", "magnitude": ".lora_magnitude_vector"},
    "a_b_default": {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight", "bias": ".lora_B.default.bias"},
}


class Ending(NamedTuple):
    """A key taken apart. `kind` is empty for tensors that several kinds have; `tensor` is oft's number there."""

    name: str
    kind: str
    tensor: str


def split(key: str) -> Ending | None:
    """None if the key is no part of an adapter."""
    found = ENDING.search(key)
    if found is None:
        return None
    name = key[: found.start()]
    half = found["half"] or found["old"]
    if half:
        return Ending(name, "lora", HALVES[half])
    for kind in ("lokr", "loha", "glora"):
        if found[kind]:
            return Ending(name, kind, found[kind])
    for tensor in ("bias", "alpha", "magnitude", "rescale", "scalar", "convolution", "on_input", "weight"):
        if found[tensor]:
            return Ending(name, "ia3" if tensor in ("on_input", "weight") else "", tensor)
    if found["full"]:
        return Ending(name, "full", "diff")
    return Ending(name, "oft", found["split"]) if found["split"] else Ending(name, "oft_blocks", "blocks")


def keys(part: Part, name: str, style: Style, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of one part under their keys, without alpha. `dtype` None keeps each tensor's own.

    Raises ModelFileError for sd-scripts' OFT, which has keys in sd-scripts' format alone.
    """
    if part.kind != "lora" and part.kind not in WRITTEN:
        raise ModelFileError(f"only sd-scripts' format has keys for {part.kind} ({name})", fix='use format "kohya"')
    endings = STYLES[style] | WRITTEN.get(part.kind, {})
    made = {}
    for tensor, value in part.tensors.items():
        if tensor == "magnitude" and style == "a_b":
            value = value.flatten()  # PEFT's vector; formats refuse norms per input before
        made[name + endings[tensor]] = value.to(dtype) if dtype and value.is_floating_point() else value
    return made


def alpha(part: Part) -> Tensor:
    """The alpha entry: a float32 scalar."""
    return torch.tensor(part.alpha, dtype=torch.float32)
