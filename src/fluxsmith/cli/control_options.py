"""`--control 'controlnet path=union.safetensors image=pose.png mode=pose scale=0.8'`: a control section in one option.

Values are written as in TOML; what is none is text, so paths need no quotes: `images=["a.png", "b.png"]`, `scale=0.5`, `image=a.png`.
"""

import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxsmith.config.control import ControlConfig
from fluxsmith.config.load import load_control, load_controls
from fluxsmith.errors import ConfigError


def controls(run: Path | None, options: Sequence[str]) -> tuple[ControlConfig, ...]:
    """The controls of a run file, then those of the options. Raises ConfigError that names what is wrong."""
    return (*(load_controls(run) if run is not None else ()), *(load_control(entry(text)) for text in options))


def entry(text: str) -> dict[str, Any]:
    """One option as a table."""
    try:
        name, *rest = _words(text)
    except ValueError as error:
        raise ConfigError(f"--control {text}", why=str(error), fix="write a type, then key=value pairs") from None
    pairs = [word.partition("=") for word in rest]
    wrong = [key for key, sign, _ in pairs if not sign]
    if not name or "=" in name or wrong:
        what = wrong[0] if wrong else name or "nothing"
        fix = "write it like --control 'controlnet path=union.safetensors image=pose.png'"
        raise ConfigError(f"--control {text}", why=f"{what} is not what is expected there: a type, then key=value pairs", fix=fix)
    return {"type": name, **{key: _value(value) for key, _, value in pairs}}


def _words(text: str) -> list[str]:
    """Words apart from blanks inside brackets, braces and quotes, which stay as they were written."""
    words, depth, quote = [""], 0, ""
    for mark in text.strip():
        if quote:
            quote = "" if mark == quote else quote
        elif mark in "\"'":
            quote = mark
        elif mark in "[{":
            depth += 1
        elif mark in "]}":
            depth -= 1
        if mark.isspace() and not depth and not quote:
            words.append("")
        else:
            words[-1] += mark
    if depth or quote:
        raise ValueError("a bracket or quote is not closed")
    return [word for word in words if word] or [""]


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        parts = shlex.split(text)
        return parts[0] if len(parts) == 1 else text
