"""Prompt files of sd-scripts (.txt with options in the line, .toml, .json) -> entries of `[[sample]]`.

`a cat --w 768 --h 512 --d 1 --s 20 --l 4 --g 1 --n blurry` is one line of a text file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxsmith.dialects.arguments import nearest
from fluxsmith.dialects.base import Draft
from fluxsmith.dialects.sd_scripts.options import read_text_file
from fluxsmith.errors import ConfigError

SEED = 42
MULTIPLE, SMALLEST, MOST_STEPS = 16, 64, 1000
KEYS = {"w": "width", "h": "height", "d": "seed", "s": "sample_steps", "l": "scale", "g": "guidance_scale", "n": "negative_prompt"}
OTHERS = {"cn": "controlnet_image", "ss": "sample_sampler", "ctr": "cfg_trunc_ratio", "rcfg": "renorm_cfg", "fs": "flow_shift"}
DEFAULTS = {"width": 512, "height": 512, "sample_steps": 20, "scale": 1.0, "guidance_scale": 3.5}
NAMES = ("prompt", "enum", *KEYS.values(), *OTHERS.values())
WHOLE = ("width", "height", "seed", "sample_steps")
OPTION = re.compile(r"([a-zA-Z]+)\s+(.+)", re.DOTALL)


def read_prompts(draft: Draft, path: Path) -> list[dict[str, Any]]:
    """The entries of a prompt file; what cannot be used is refused or noted in the draft.

    Raises ConfigError for a file that cannot be read.
    """
    from_file = {".txt": _text, ".toml": _structured, ".json": _structured}.get(path.suffix.lower())
    if from_file is None:
        draft.refuse(draft.where("sample_prompts"), f"{path} is no prompt file", "give a .txt, .toml or .json file")
        return []
    entries = [_sample(draft, where, values) for where, values in from_file(draft, path)]
    if not entries:
        draft.refuse(str(path), "the file has no prompt", "write one prompt a line")
    if any("seed" not in values for _, values in from_file(draft, path)):
        draft.note("--sample_prompts", f"prompts without --d are drawn with seed {SEED}, so that pictures of different steps compare")
    return entries


def _text(draft: Draft, path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ConfigError("the prompt file is not there", where=str(path), fix="check --sample_prompts") from None
    except UnicodeDecodeError:
        raise ConfigError("the prompt file is not UTF-8 text", where=str(path), fix="save it as UTF-8") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    return [(f"{path}:{number}", prompt_line(draft, line, f"{path}:{number}")) for number, line in numbered if line and line[0] != "#"]


def prompt_line(draft: Draft, line: str, where: str) -> dict[str, Any]:
    """Prompt and options of one line. Options begin with a space and two dashes; dashes inside words do not count."""
    prompt, *parts = f" {line}".split(" --")
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for part in parts:
        match = OPTION.fullmatch(part.strip())
        key = match[1].lower() if match else part.strip()
        name = (KEYS | OTHERS).get(key)
        if match is None or name is None:
            close = nearest(key, KEYS | OTHERS) if match else ""
            fix = f"write --{close}" if close else f"use one of {', '.join('--' + known for known in KEYS)}"
            draft.note(where, f"--{part.strip()} is no option of a prompt and is left out; {fix}")
        else:
            _store(draft, values, name, match[2].strip(), where)
    return values


def _store(draft: Draft, values: dict[str, Any], name: str, text: Any, where: str) -> None:
    try:
        if name in WHOLE:
            values[name] = int(text)
        elif name in DEFAULTS:
            values[name] = float(text)
        else:
            values[name] = text
    except (TypeError, ValueError):
        draft.refuse(where, f"{name} = {text!r} is not a number", "give a number")


def _structured(draft: Draft, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """TOML: `prompt` with what all share and `prompt.subset`; JSON: a list of tables or of texts."""
    file = read_text_file(path, what="the prompt file")
    if path.suffix.lower() == ".toml":
        table = file.tree.get("prompt") if isinstance(file.tree, Mapping) else None
        if not isinstance(table, Mapping):
            raise ConfigError("the file has no [prompt]", where=str(path), fix="write [prompt] and [[prompt.subset]]")
        shared = {key: value for key, value in table.items() if key != "subset"}
        found = [(file.place("prompt", "subset", index), subset, shared) for index, subset in enumerate(table.get("subset", []))]
    elif isinstance(file.tree, list):
        found = [(f"{path}: entry {index}", item, {}) for index, item in enumerate(file.tree)]
    else:
        raise ConfigError("the file holds no list", where=str(path), fix='write ["a cat", {"prompt": "a dog", "width": 512}]')
    return [(where, _table(draft, where, item, shared)) for where, item, shared in found]


def _table(draft: Draft, where: str, item: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(item, str):
        return prompt_line(draft, item, where)
    if not isinstance(item, Mapping):
        draft.refuse(where, "a prompt is a text or a table", 'write { prompt = "a cat" }')
        return {"prompt": ""}
    twice = sorted(set(item) & set(shared))
    if twice:
        draft.refuse(where, f"{', '.join(twice)} stands in [prompt] and in its subset", "keep one of them")
    values: dict[str, Any] = {}
    for key, value in {**shared, **item}.items():
        if key not in NAMES:
            close = nearest(key, NAMES)
            draft.refuse(where, f"{key} is no option of a prompt", f"write {close}" if close else f"use one of {', '.join(NAMES)}")
        elif key == "prompt":
            values |= prompt_line(draft, str(value), where)
        else:
            _store(draft, values, key, value, where)
    return values


def _sample(draft: Draft, where: str, values: dict[str, Any]) -> dict[str, Any]:
    """One native entry: sides floored to 16, what FLUX does not use said aloud."""
    full = {**DEFAULTS, **values}
    if not full.get("prompt"):
        draft.refuse(where, "there is no prompt", "write what to draw")
    steps = min(max(full["sample_steps"], 1), MOST_STEPS)
    entry: dict[str, Any] = {
        "prompt": full.get("prompt", ""),
        "width": side(full["width"]),
        "height": side(full["height"]),
        "steps": steps,
        "guidance": full["guidance_scale"],
        "cfg": full["scale"],
        "seed": full.get("seed", SEED),
    }
    if full.get("negative_prompt") and full["scale"] != 1:
        entry["negative"] = full["negative_prompt"]
    elif full.get("negative_prompt"):
        draft.note(where, "the negative prompt has no effect without --l (true guidance), so it is left out")
    _condition(draft, where, entry, str(full.get("controlnet_image") or ""))
    for name in ("sample_sampler", "cfg_trunc_ratio", "renorm_cfg", "flow_shift"):
        if name in full:
            draft.note(where, f"{name} has no effect on FLUX, in sd-scripts neither")
    return entry


def _condition(draft: Draft, where: str, entry: dict[str, Any], image: str) -> None:
    if draft.script == "flux_train_control_net":
        entry["control_image"] = image
        if not image:
            draft.refuse(where, "the condition picture is missing", "add --cn PICTURE.png to the prompt")
    elif image:
        draft.note(where, "--cn is for the ControlNet trainer and is left out")


def side(pixels: int) -> int:
    """Floored to a multiple of 16, 64 at least."""
    return max(SMALLEST, pixels // MULTIPLE * MULTIPLE)
