"""The scripts of sd-scripts that have a place here, and how a user may write their names.

`split_command(["accelerate", "launch", "sd-scripts/flux_train_network.py", "--ae=ae.safetensors"])` gives the script and its arguments.
"""

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from fluxsmith.dialects.arguments import nearest
from fluxsmith.dialects.base import Row, read_rows, rows_of
from fluxsmith.errors import ConfigError

OPTIONS = Path(__file__).parent / "options.toml"
LAUNCHERS = ("accelerate", "python", "python3", "torchrun", "deepspeed", "uv")
ELSEWHERE = {  # scripts for other models
    **dict.fromkeys(("train_network", "train_db", "fine_tune"), "Stable Diffusion"),
    **dict.fromkeys(("sdxl_train_network", "sdxl_train"), "SDXL"),
    **dict.fromkeys(("sd3_train_network", "sd3_train"), "Stable Diffusion 3"),
    "lumina_train_network": "Lumina",
    "hunyuan_image_train_network": "HunyuanImage",
    "anima_train_network": "Anima",
}


class Script(NamedTuple):
    """One script; `kind` is what it does: train, draw, tool or cache."""

    name: str
    kind: str
    help: str


SCRIPTS = (
    Script("flux_train_network", "train", "train a LoRA or another adapter"),
    Script("flux_train", "train", "train the whole model"),
    Script("flux_train_control_net", "train", "train a ControlNet"),
    Script("flux_minimal_inference", "draw", "make a picture"),
    Script("flux_extract_lora", "tool", "a LoRA from the difference of two models"),
    Script("flux_merge_lora", "tool", "merge LoRAs into a model or with each other"),
    Script("convert_flux_lora", "tool", "key names of a LoRA"),
    Script("resize_lora", "tool", "rank of a LoRA"),
    Script("check_lora_weights", "tool", "list the weights of a file"),
    Script("cache_latents", "cache", "encode pictures before a training"),
    Script("cache_text_encoder_outputs", "cache", "encode captions before a training"),
)


def find_script(word: str) -> Script | None:
    """The script that a word names: with or without `.py`, with or without folders."""
    stem = PurePath(word.replace("\\", "/")).name.removesuffix(".py").removeprefix("networks.").removeprefix("tools.")
    return next((script for script in SCRIPTS if script.name == stem), None)


def split_command(words: Sequence[str]) -> tuple[Script, list[str], str]:
    """Script, its arguments, and the launcher whose words were passed over. Raises ConfigError that lists the scripts."""
    if not words:
        raise ConfigError("no script is named", fix=f"name one of {', '.join(script.name for script in SCRIPTS)}")
    first = find_script(words[0])
    if first is not None:
        return first, list(words[1:]), ""
    if PurePath(words[0]).name in LAUNCHERS:
        for place, word in enumerate(words):
            found = find_script(word)
            if found is not None:
                return found, list(words[place + 1 :]), " ".join(words[:place])
        words = [next((word for word in words if word.endswith(".py")), words[0])]
    stem = PurePath(words[0]).name.removesuffix(".py")
    if stem in ELSEWHERE:
        raise ConfigError(
            f"{stem} is for {ELSEWHERE[stem]}", fix="fluxsmith knows FLUX.1 and Chroma only: flux_train_network, flux_train, ..."
        )
    close = nearest(stem, (script.name for script in SCRIPTS))
    fix = f"write {close}" if close else f"name one of {', '.join(script.name for script in SCRIPTS)}"
    raise ConfigError(f"{words[0]!r} is no script that is known here", fix=fix)


def option_rows(script: str) -> dict[str, Row]:
    """Name -> row of all options of a script."""
    return rows_of(read_rows(OPTIONS), script)
