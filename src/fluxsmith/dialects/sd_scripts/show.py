"""What a user reads about sd-scripts' options: the list of scripts, the help of one script, and the Markdown reference.

`python -m fluxsmith.dialects.sd_scripts.show docs/reference` (`make docs`) writes `sd-scripts-options.md`.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from fluxsmith.dialects.base import Row, read_rows
from fluxsmith.dialects.sd_scripts.scripts import OPTIONS, SCRIPTS, Script, option_rows

PAGE = "sd-scripts-options.md"
PLACES = {  # where the functions of lower_*.py put what they read
    **dict.fromkeys(("model", "tokenizers"), "`model`"),
    **dict.fromkeys(("adapter", "start_weights", "text_encoders"), "`adapter`"),
    **dict.fromkeys(("precision", "length", "seed"), "`train`"),
    **dict.fromkeys(("swap", "checkpointing", "fused"), "`memory`"),
    **dict.fromkeys(("weighting", "timestep_range"), "`noise`"),
    **dict.fromkeys(("file_format", "checkpoints", "states", "metadata"), "`checkpoint`"),
    "base_weights": "`base_adapters`",
    "control": "`control`",
    "deepspeed": "`distributed`",
    "fp8": "`quant`",
    "optimizer": "`optim`",
    "schedule": "`schedule`",
    "loss": "`objective`",
    "caches": "`cache`",
    "dataset": "`data`",
    "output": "`run`, `checkpoint.weights_dir`",
    "resume": "continues that state",
    "samples": "`sample`",
    "validation": "`validation`",
    "logging": "`sinks`",
    "config_file": "read or written before the others",
}
INTRODUCTION = """# Options of sd-scripts

Made by `make docs` from `dialects/sd_scripts/options.toml`; do not edit. Every option of the scripts that `fluxsmith sd-scripts` runs,
with the default that sd-scripts gives it. *kept*: it does what it says (where it takes its value as it is, its place in a run file is
named). *ignored*: it is accepted, and the report of the command says why it has no effect. *refused*: the command stops and says what
to do instead.
How to use it: [coming from sd-scripts](../how-to/from-sd-scripts.md).
"""


def overview() -> str:
    """The help of `fluxsmith sd-scripts`."""
    width = max(len(script.name) for script in SCRIPTS)
    lines = [
        "usage: fluxsmith sd-scripts SCRIPT OPTIONS",
        "",
        "Run an sd-scripts command line as it is. SCRIPT may end in .py and have folders.",
        "",
    ]
    lines += [f"  {script.name:<{width}}  {script.help}" for script in SCRIPTS if is_ready(script)]
    lines += ["", "fluxsmith sd-scripts SCRIPT --help lists its options and what becomes of them."]
    return "\n".join([*lines, "fluxsmith translate sd-scripts SCRIPT OPTIONS prints the run file that a training command means."])


def is_ready(script: Script) -> bool:
    """Is there something that does what the script does?"""
    return script.kind in ("train", "draw", "cache", "tool")


def script_help(script: Script) -> str:
    """Options of one script, by group."""
    rows = option_rows(script.name)
    lines = [f"usage: fluxsmith sd-scripts {script.name} OPTIONS", "", f"{script.help[0].upper()}{script.help[1:]}."]
    for group in dict.fromkeys(row.group for row in rows.values()):
        lines += ["", f"{group}:"]
        lines += [_help_line(row) for row in rows.values() if row.group == group]
    return "\n".join(lines)


def _help_line(row: Row) -> str:
    value = "" if row.type == "flag" else f" {row.type.upper()}{' ...' if row.nargs else ''}"
    fate = "" if row.fate == "kept" else f" [{row.fate}: {row.why}]"
    return f"  {row.flag + value:<44} {row.help}{fate}"


def reference() -> str:
    """The page of all options."""
    rows = read_rows(OPTIONS)
    counts = [f"| `{script.name}` | {script.help} | {len(option_rows(script.name))} |" for script in SCRIPTS if is_ready(script)]
    parts = [INTRODUCTION, "| Script | Does | Options |\n|---|---|---|", "\n".join(counts)]
    trainers = [row for row in rows if any(name.startswith("flux_train") for name in row.scripts)]
    text = "\n".join(parts) + "\n\n## Training\n\nWhere a script is not named, the three trainers have the option.\n"
    for group in dict.fromkeys(row.group for row in trainers):
        text += f"\n### {group.capitalize()}\n\n{_table(row for row in trainers if row.group == group)}"
    for script in SCRIPTS:
        if script.kind in ("draw", "tool") and is_ready(script):
            text += f"\n## {script.name}\n\n{_table(row for row in rows if script.name in row.scripts)}"
    own = [row for row in rows if row.scripts and all(name.startswith("cache_") for name in row.scripts)]
    return text + f"\n## Cache tools\n\nBeside the options of models, data and caches above:\n\n{_table(own)}"


def _table(rows: Iterable[Row]) -> str:
    lines = ["| Option | Default | Fate | Becomes, reason or cure | What it does in sd-scripts |", "|---|---|---|---|---|"]
    for row in rows:
        default = "" if row.default in (None, "") or row.type == "flag" else f"`{row.default}`"
        said = f"`{row.to}`" if row.to else PLACES.get(row.by, row.why)
        if row.advice:
            said = f"{said}; {row.advice}".removeprefix("; ")
        cells = (f"`{row.flag}`{_scripts(row)}", default, row.fate, said, row.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _scripts(row: Row) -> str:
    trainers = [name for name in row.scripts if name.startswith("flux_train")]
    return f" ({', '.join(trainers)})" if 0 < len(trainers) < 3 else ""


def main(folder: Path) -> None:
    """Writes the page."""
    (folder / PAGE).write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
