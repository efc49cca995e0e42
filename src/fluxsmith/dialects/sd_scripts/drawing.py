"""flux_minimal_inference.py -> a drawing: model, LoRAs, settings. Lines of `--interactive` change the settings."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from fluxsmith.dialects.base import Draft
from fluxsmith.dialects.sd_scripts.lower_model import identity_of
from fluxsmith.errors import ConfigError, Problem
from fluxsmith.models.family.flux1 import PRESETS

DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16"), "bf16"),
    **dict.fromkeys(("float16", "fp16", "half"), "fp16"),
    **dict.fromkeys(("float32", "fp32", "float"), "fp32"),
}
MULTIPLE = 16
SCHNELL_STEPS, STEPS = 4, 50
LINE = {"w": "width", "h": "height", "s": "steps", "d": "seed", "g": "guidance", "n": "negative", "c": "cfg", "m": "strengths"}


@dataclass(frozen=True)
class Drawing:
    """What is drawn, with what. `seed` None is a new one for each picture."""

    model: dict[str, Any]
    prompt: str
    output_dir: str
    dtype: str | None
    settings: dict[str, Any]
    seed: int | None = None
    loras: tuple[tuple[str, float], ...] = ()
    is_merged: bool = False
    is_interactive: bool = False
    notes: tuple[str, ...] = field(default=())


def drawing(draft: Draft) -> Drawing:
    """The drawing of a command. Raises ConfigError with everything that is missing."""
    draft.apply_rows()
    model = _model(draft)
    is_schnell = model.get("preset") == "schnell"
    settings = {
        "width": up(draft["width"]),
        "height": up(draft["height"]),
        "steps": draft["steps"] or (SCHNELL_STEPS if is_schnell else STEPS),
        "guidance": draft["guidance"],
        "cfg": draft["cfg_scale"],
        "negative": draft["negative_prompt"] or "",
    }
    if settings["negative"] and settings["cfg"] == 1:
        draft.note("--negative_prompt", "has no effect without --cfg_scale")
        settings["negative"] = ""
    loras = tuple(_weighted(draft, text) for text in draft["lora_weights"] or [])
    draft.finish(draft.script)
    return Drawing(
        model,
        draft["prompt"],
        draft["output_dir"],
        _dtype(draft, "flux_dtype") or (_dtype(draft, "dtype") if draft.has("dtype") else None),
        settings,
        seed=draft["seed"],
        loras=loras,
        is_merged=draft["merge_lora_weights"],
        is_interactive=draft["interactive"],
        notes=tuple(draft.report.lines()),
    )


def _model(draft: Draft) -> dict[str, Any]:
    chroma = draft["model_type"] == "chroma"
    for name in ("ckpt_path", "t5xxl", "ae") if chroma else ("ckpt_path", "clip_l", "t5xxl", "ae"):
        if not draft[name]:
            draft.refuse(f"--{name}", f"--{name} is not given", f"add --{name} FILE.safetensors")
    found = identity_of(draft["ckpt_path"])
    if found and (found.family == "chroma") != chroma:
        fix = f"write --model_type {'flux' if chroma else 'chroma'}"
        draft.refuse(draft.where("model_type"), f"{draft['ckpt_path']} is {found.describe()}", fix)
    model: dict[str, Any] = {"type": "chroma" if chroma else "flux1"}
    if not chroma:
        model["preset"] = found.variant if found and found.variant in PRESETS else "dev"
        model["clip_l"] = draft["clip_l"] or ""
        if draft["apply_t5_attn_mask"]:
            model["mask_text"] = True
    model |= {"path": draft["ckpt_path"] or "", "t5xxl": draft["t5xxl"] or "", "ae": draft["ae"] or ""}
    text = [_dtype(draft, name) for name in ("t5xxl_dtype", "clip_l_dtype", "dtype") if draft.has(name)]
    if text:
        model["text_dtype"] = text[0]
        if len(set(text)) > 1 and draft.has("clip_l_dtype") and draft.has("t5xxl_dtype"):
            draft.note("--clip_l_dtype", f"both text encoders take the type of --t5xxl_dtype, {text[0]}")
    return model


def _dtype(draft: Draft, name: str) -> str | None:
    given = draft[name]
    if not given:
        return None
    found = DTYPES.get(given)
    if found is None:
        fix = "write bf16, fp16 or fp32" + ("; 8-bit files load as they are" if "fp8" in given else "")
        draft.refuse(draft.where(name), f"--{name} {given} is not known", fix)
    return found


def _weighted(draft: Draft, text: str) -> tuple[str, float]:
    """`path` or `path;strength`."""
    path, _, number = text.partition(";")
    try:
        strength = float(number) if number else 1.0
    except ValueError:
        strength = math.nan
    if not path or not math.isfinite(strength):
        draft.refuse(draft.where("lora_weights"), f"--lora_weights {text!r}", 'write "file.safetensors;0.8"')
    return path, strength


def up(pixels: int) -> int:
    """Rounded up to a multiple of 16."""
    return max(MULTIPLE, -(-pixels // MULTIPLE) * MULTIPLE)


def changed(base: Drawing, line: str) -> Drawing:
    """The drawing that a line asks for: `a cat --w 512 --d 3 --m 0.5,1`. Raises ConfigError for what cannot be read."""
    prompt, *parts = f" {line}".split(" --")
    settings, seed, loras = dict(base.settings), base.seed, base.loras
    for part in parts:
        key, _, text = part.strip().partition(" ")
        name = LINE.get(key.lower())
        if name is None:
            known = ", ".join(f"--{letter}" for letter in LINE)
            raise ConfigError(f"--{key} is no option of a prompt", fix=f"use one of {known}")
        try:
            if name == "strengths":
                loras = _strengths(base, [float(number) for number in text.split(",")])
            elif name == "seed":
                seed = int(text)
            else:
                settings[name] = _setting(name, text.strip())
        except ValueError:
            raise ConfigError(f"--{key} {text} is not a number", fix="give a number") from None
    if settings["negative"] and settings["cfg"] == 1:
        settings["negative"] = ""
    return replace(base, prompt=prompt.strip() or base.prompt, settings=settings, seed=seed, loras=loras)


def _setting(name: str, text: str) -> Any:
    if name in ("width", "height"):
        return up(int(text))
    if name == "negative":
        return text
    return int(text) if name == "steps" else float(text)


def _strengths(base: Drawing, numbers: list[float]) -> tuple[tuple[str, float], ...]:
    if len(numbers) != len(base.loras):
        what = f"--m has {len(numbers)} strengths for {len(base.loras)} LoRAs"
        raise ConfigError(what, problems=(Problem(what, fix="give one for each, as --m 0.5,1.0"),))
    return tuple((path, number) for (path, _), number in zip(base.loras, numbers, strict=True))
