"""`fluxsmith model ...`: what weights files are. Example: `fluxsmith model identify flux1-dev.safetensors --json`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fluxsmith.errors import FluxsmithError
from fluxsmith.io.identify import identify

app = typer.Typer(help="Look at model files.", no_args_is_help=True)
UNKNOWN = 4  # exit code: a file is unreadable or of no known kind


@app.callback()
def model() -> None:
    """Look at model files."""


@app.command("identify")
def identify_files(
    files: Annotated[list[str], typer.Argument(help="Weights files, shards, or folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for one file, a list for several.")] = False,
) -> None:
    """Say which model or adapter each file is, from its header alone. Exit code 4 if one is unreadable or unknown."""
    records = [_record(file) for file in files]
    if as_json:
        print(json.dumps(records[0] if len(records) == 1 else records, indent=1))
    else:
        for record in records:
            print(_text(record))
    if any(record["role"] == "unknown" for record in records):
        raise typer.Exit(UNKNOWN)


def _record(file: str) -> dict[str, Any]:
    try:
        found = identify(Path(file))
    except FluxsmithError as error:
        empty = {"family": "unknown", "role": "unknown", "variant": "", "key_style": "", "prefix": "", "notes": [], "sizes": {}}
        return {"path": file, **empty, "problems": [str(problem) for problem in error.problems], "is": "unreadable"}
    return {**found.as_record(), "path": file, "is": found.describe()}


def _text(record: dict[str, Any]) -> str:
    lines = [f"{record['path']}: {record['is']}"]
    sizes = record["sizes"]
    if sizes:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sizes["dtypes"].items())
        lines.append(f"  {sizes['tensors']} tensors, {sizes['parameters']:,} parameters, {dtypes}")
        shown = {name: value for name, value in sizes.items() if name not in ("tensors", "parameters", "bytes", "dtypes", "roles")}
        lines += ["  " + ", ".join(f"{name} {value}" for name, value in shown.items())] if shown else []
        lines += [f"  {role}: keys under {prefix}" for role, prefix in sizes.get("roles", {}).items()]
    lines += [f"  problem: {text}" for text in record["problems"]]
    lines += [f"  note: {text}" for text in record["notes"]]
    return "\n".join(lines)
