"""README and docs: commands run or parse, run files are valid, shown output is what is printed, links lead somewhere."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from doc_blocks import ROOT, Block, Command, blocks, documents, links

from fluxsmith.cli import main as cli
from fluxsmith.config.load import load_config, load_control, load_model
from fluxsmith.dialects.arguments import parse as parse_options
from fluxsmith.dialects.sd_scripts.scripts import option_rows, split_command

BLOCKS = [block for path in documents() for block in blocks(path)]
LANGUAGES = {"console", "sh", "toml", "python", ""}
SHELL = {"source", "touch", "cd", "mkdir", "ls"}  # of the shell itself; nothing of ours to check
MINIMAL = {
    "model": {"type": "flux1", "path": "x"},
    "train": {"steps": 1000},
    "data": [{"type": "folder", "path": "x"}],
    "run": {"dir": "runs/x"},
}
FILES_WITH_COMMANDS = sorted({block.file for block in BLOCKS if block.language in ("console", "sh", "python")})


def label(block: Block) -> str:
    return f"{block.file}:{block.line}"


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    broken = [
        link for link in links(path) if not re.match(r"https?:|#", link) and not (path.parent / link.partition("#")[0]).resolve().exists()
    ]
    assert broken == []


def test_every_document_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link).resolve() for link in links(index)}
    written = {path.resolve() for path in (ROOT / "docs").rglob("*.md") if path != index and "decisions" not in path.parts}
    assert written - linked == set()


def test_blocks_say_their_language() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert [label(block) for block in BLOCKS if block.language == "" and "$ " in block.text] == []


@pytest.mark.parametrize("block", of("toml"), ids=label)
def test_run_files_are_valid(block: Block) -> None:
    """A fragment is put into a minimal run first."""
    given = tomllib.loads(block.text)
    if "for drawing" in block.notes:
        load_model(given)
        assert [load_control(entry).type for entry in given["control"]]
        return
    merged: dict[str, Any] = {**MINIMAL, **given}
    if "train" in given and not {"steps", "epochs"} & set(given["train"]):
        merged["train"] = {**MINIMAL["train"], **given["train"]}  # type: ignore[dict-item]
    load_config(merged)


def test_the_tutorial_quotes_the_example() -> None:
    example = ROOT / "examples" / "tiny" / "run.toml"
    quoted = [block for block in of("toml") if block.file == "docs/tutorial/first-lora.md"]
    assert [line for block in quoted for line in block.text.splitlines() if line not in example.read_text().splitlines()] == []


# ---- commands -------------------------------------------------------------------------------------------------------


def ours(words: Sequence[str]) -> list[str] | None:
    """Arguments of fluxsmith in a command line: after its name, or after `-m fluxsmith` of a launcher."""
    if words[0] == "fluxsmith":
        return list(words[1:])
    if words[0] in ("python", "torchrun", "accelerate") and "fluxsmith" in words:
        return list(words[words.index("fluxsmith") + 1 :])
    return None


def check(line: str, *, is_valid: bool = True) -> None:
    """The command exists, its options are known, and its changes are options of a run."""
    words = shlex.split(line)
    arguments = ours(words)
    if arguments is not None:
        context = parsed(arguments)
        run_file = context.get("run")
        if is_valid and run_file is not None and Path(run_file).is_file():
            load_config(run_file, context.get("changes") or ())
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), line
    elif words[:2] == ["python", "-m"]:
        options = module_help(words[2])
        assert [word for word in words[3:] if word.startswith("--") and word not in options] == [], line
    elif words[0] == "python" and words[1].startswith("examples/"):
        known = (ROOT / words[1]).with_name("options.py").read_text(encoding="utf-8") + (ROOT / words[1]).read_text(encoding="utf-8")
        assert [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in known] == [], line
    else:
        assert words[0] in SHELL, f"{line}: nobody checks this kind of command"


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Parameters of a verb, by the parser that runs it. Raises for unknown verbs and options."""
    verb, rest = cli._find(arguments)
    assert verb is not None, arguments
    if verb.raw:  # arguments of another trainer: its table of options knows them
        words = rest[: rest.index(">")] if ">" in rest else rest
        if words[-1:] != ["--help"]:
            script, options, _ = split_command(words[1:] if verb.name == "translate" else words)
            assert parse_options(option_rows(script.name), options, title=script.name)[1] == []
        return {}
    module = importlib.import_module(verb.module)
    if verb.member:
        command = typer.main.get_command(module.app).commands[verb.member]  # type: ignore[attr-defined]
    else:
        app = typer.Typer()
        app.command()(module.command)
        command = typer.main.get_command(app)
    return command.make_context(verb.name, rest).params


def module_help(name: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    return out.getvalue()


def test_the_check_finds_mistakes() -> None:
    for line in (
        "fluxsmith trian run.toml",
        "fluxsmith train run.toml --resum",
        "make dmo",
        "python -m fluxsmith.demo.blank --sed 1",
        "rm -r x",
    ):
        with pytest.raises((Exception, AssertionError)):
            check(line)


@pytest.mark.parametrize("block", of("console", "sh"), ids=label)
def test_commands_are_known(block: Block, workspace: Path) -> None:
    for command in block.commands():
        check(command.line, is_valid=block.exit_code == 0)


def quick(arguments: list[str]) -> list[str]:
    """Documents show real lengths; here a few steps are enough."""
    if arguments[0] != "train":
        return arguments
    last = 6 if "--resume" in arguments else 4
    words = [word for word in arguments if not (word.startswith("train.steps=") and "examples" in arguments[1])]
    return [*words, f"train.steps={last}", "checkpoint.every=2"] if "examples" in arguments[1] else words


def run(arguments: list[str]) -> tuple[int, list[str]]:
    """Exit code and all lines, results first."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(quick(arguments))
    return code, [*out.getvalue().splitlines(), *err.getvalue().splitlines()]


def pattern(line: str) -> re.Pattern[str]:
    """A shown line with its numbers free, `...` for anything, and any number of blanks between words."""
    parts = [re.escape(part) for part in line.strip().split("...")]
    text = ".*".join(re.sub(r"\d+(\\?\.\d+)?", r"[0-9.]+", part) for part in parts)
    return re.compile(re.sub(r"(\\ )+", r"\\s+", text))


def execute(command: Command, code: int) -> None:
    words = shlex.split(command.line)
    arguments = ours(words)
    if arguments is None:
        check(command.line)
        return
    found, lines = run(arguments)
    assert found == code, "\n".join([command.line, *lines])
    for shown in command.output:
        wanted = pattern(shown)
        assert any(wanted.fullmatch(line.strip()) for line in lines), "\n".join([command.line, f"shown: {shown}", "printed:", *lines])


def test_shown_lines_match_what_is_printed() -> None:
    assert pattern("step 1/4  loss 0.25").fullmatch("step 12/40 loss   1.75")
    assert pattern("state saved: ...").fullmatch("state saved: runs/x (5)")
    assert not pattern("after 5 s").fullmatch("after many s")
    assert not pattern("steps (0)").fullmatch("steps 0")


@pytest.mark.parametrize("file", FILES_WITH_COMMANDS)
def test_commands_run(file: str, workspace: Path) -> None:
    """All blocks of a document in order, in one workspace, as a reader would type them."""
    run_blocks = [block for block in BLOCKS if block.file == file and block.is_run]
    if not any("needs a run" in note for block in run_blocks for note in block.notes):
        shutil.rmtree(workspace / "runs")
    for block in run_blocks:
        if block.language == "python":
            exec(compile(block.text.replace("train.steps=500", "train.steps=2"), label(block), "exec"), {"__name__": "__main__"})  # noqa: S102
        elif block.language in ("console", "sh"):
            commands = block.commands()
            for command in commands:
                execute(command, block.exit_code if command is commands[-1] else 0)
