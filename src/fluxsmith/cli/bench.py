"""`fluxsmith bench 'lora-*-1024*' --size full`: time, memory and correctness of steps and pictures, on random weights.

Exit code 3: a scenario failed, or one of its checks did.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fluxsmith.cli.arguments import AsJson
from fluxsmith.config.memory import MemoryConfig
from fluxsmith.errors import ConfigError

FAILED = 3  # exit code
AGAINST = {"diffusers": Path(__file__).resolve().parents[3] / "bench" / "against_diffusers.py"}


def command(  # noqa: PLR0913  as many as it has options
    patterns: Annotated[list[str] | None, typer.Argument(metavar="[PATTERN]...", help="Names or globs of scenarios.")] = None,
    *,
    listed: Annotated[bool, typer.Option("--list", help="Name the scenarios and measure nothing.")] = False,
    size: Annotated[
        Literal["tiny", "half", "full"] | None, typer.Option("--model", help="Size of the model; full on a card, tiny without.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to measure.")] = "auto",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed steps after the warm-up.")] = 20,
    loss_steps: Annotated[int, typer.Option("--loss-steps", min=0, help="Steps whose loss is compared with the exact base's.")] = 50,
    card: Annotated[str, typer.Option("--card", metavar="SIZE", help="Emulate a smaller card, such as 12GB.")] = "",
    ceiling: Annotated[float, typer.Option("--ceiling", min=0, help="TFLOP/s of the device in 16 bits; by default from a table.")] = 0.0,
    checks: Annotated[bool, typer.Option("--checks/--no-checks", help="Compare with the exact base and the resident model.")] = True,
    against: Annotated[
        str, typer.Option("--against", metavar="FILE", help="Script that measures the same with other software, or diffusers.")
    ] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the result here, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the table here.")] = None,
    apart: Annotated[bool, typer.Option("--apart/--in-process", help="Measure each scenario in a process of its own.")] = True,
    as_json: AsJson = False,
) -> None:
    """Measure steps and memory on random weights of FLUX.1's sizes; nothing is downloaded. Exit code 3: something failed."""
    from fluxsmith.bench.scenarios import chosen

    found = chosen(patterns or ["*"])
    if listed:
        for one in found:
            print(f"{one.name:<28}  {one.about}")
        return
    emulated = _card(card)
    script = _script(against)
    from fluxsmith.bench.session import Wish, run, table
    from fluxsmith.train.distributed import join_world

    place = join_world(device).device.type
    if not patterns and place == "cpu":
        raise ConfigError("all scenarios on a CPU would take hours", fix="name some, for example fluxsmith bench 'lora-*-512-b1-none'")
    wish = Wish(
        tuple(found), size or ("full" if place == "cuda" else "tiny"), place, repeats, loss_steps, emulated, ceiling, checks, apart, script
    )  # fmt: skip
    result = run(wish, lambda text: print(text, file=sys.stderr))
    text = json.dumps(result, indent=1)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text(table(result), encoding="utf-8")
    print(text if as_json else table(result))
    if any(_is_bad(row) for row in result["rows"]):
        raise typer.Exit(FAILED)


def _is_bad(row: dict[str, Any]) -> bool:
    return "failed" in row or any(check["ok"] is False for check in row.get("checks", {}).values())


def _card(text: str) -> float:
    if not text:
        return 0.0
    try:
        return MemoryConfig.model_validate({"card": text}).card or 0.0
    except ValueError:
        raise ConfigError(f"--card {text} is no size", fix="write for example --card 12GB") from None


def _script(text: str) -> Path | None:
    if not text:
        return None
    path = AGAINST.get(text, Path(text))
    if not path.is_file():
        raise ConfigError(f"--against {text}", why=f"there is no file {path}", fix="use it in a source tree, or give a script of your own")
    return path
