"""`fluxsmith lora ...`: look at adapter files. Example: `fluxsmith lora check cats.safetensors --base flux1-dev.safetensors`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxsmith.io.durable import readable_size

if TYPE_CHECKING:
    from fluxsmith.tools.inspect import Check, Inspection

app = typer.Typer(help="Look at adapter files.", no_args_is_help=True)
BROKEN = 4  # exit code of a file that is not sound
SHOWN_METADATA = ("ss_output_name", "ss_base_model_version", "ss_steps", "ss_learning_rate", "ss_optimizer", "modelspec.title",
                  "modelspec.architecture", "modelspec.trigger_phrase", "modelspec.license", "modelspec.date")  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def lora() -> None:
    """Look at adapter files."""


@app.command("inspect")
def inspect_file(file: Annotated[Path, typer.Argument(help="Adapter file.")], as_json: AsJson = False) -> None:
    """Say what an adapter file is and holds: kind, format, ranks, blocks, norms, metadata. Exit code 4 if it is broken."""
    from fluxsmith.tools.inspect import inspect

    found = inspect(file)
    print(json.dumps(found.as_record(), indent=1) if as_json else "\n".join(_inspection_lines(found)))
    if found.problems or found.not_finite:
        raise typer.Exit(BROKEN)


@app.command("check")
def check_file(
    file: Annotated[Path, typer.Argument(help="Adapter file.")],
    base: Annotated[Path | None, typer.Option("--base", help="Base model: layer sizes are compared (its header only).")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether an adapter file is sound and which programs load all of it. Exit code 4 if it is broken."""
    from fluxsmith.tools.inspect import check

    found = check(file, base)
    print(json.dumps(found.as_record(), indent=1) if as_json else "\n".join(_check_lines(found)))
    if not found.is_sound:
        raise typer.Exit(BROKEN)


@app.command("weights")
def weights(
    file: Annotated[Path, typer.Argument(help="Adapter file, or with --all any weights file.")],
    shows_all: Annotated[bool, typer.Option("--all", "-a", help="Every tensor, not only the factors of an adapter.")] = False,
    as_json: AsJson = False,
) -> None:
    """Name, shape, mean and smallest absolute value of each weight; a smallest value of 0 in an up factor means it was never trained."""
    from fluxsmith.tools.weights import weight_report

    figures = weight_report(file, shows_all=shows_all)
    if as_json:
        print(json.dumps([item._asdict() for item in figures], indent=1))
        return
    for item in figures:
        shape = " x ".join(map(str, item.shape)) or "one value"
        print(f"{item.name}  {shape}  mean {item.mean:.6g}  least {item.least:.6g}  largest {item.largest:.6g}")


def _inspection_lines(found: "Inspection") -> list[str]:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    lines = [f"{found.path}: {found.kind} in {found.format} names", f"  {readable_size(found.bytes)}, {found.tensors} tensors ({dtypes})"]
    if found.roles:
        lines.append("  layers: " + ", ".join(f"{count} of {role}" for role, count in found.roles.items()))
        lines += [f"  {stack}: {_ranges(numbers)}" for stack, numbers in found.blocks.items() if numbers]
        lines += [f"  {kind}: rank {_counts(ranks)}, alpha {_counts(found.alphas[kind])}" for kind, ranks in found.ranks.items()]
        lines += ["  norm of the change per block:"]
        lines += [f"    {block} {value:.4g}" for block, value in found.norms.items()]
    lines += [f"  {key}: {found.metadata[key]}" for key in SHOWN_METADATA if key in found.metadata]
    lines += [f"  problem: {text}" for text in found.problems]
    lines += [f"  problem: {len(found.not_finite)} tensors are not finite, e.g. {found.not_finite[0]}"] if found.not_finite else []
    return lines


def _check_lines(found: "Check") -> list[str]:
    lines = [f"{found.path}: {'sound' if found.is_sound else 'broken'}", f"  {found.verdict.text}"]
    lines += [f"  problem: {text}" for text in found.problems]
    return lines + [f"  note: {text}" for text in found.notes]


def _counts(values: dict[Any, int]) -> str:
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count})" for value, count in values.items())


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
