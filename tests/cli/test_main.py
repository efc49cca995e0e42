"""The command line: verbs by table, exit codes, messages, and what must not be imported."""

import errno
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from fluxsmith.cli import main as cli
from fluxsmith.cli import show, verbs
from fluxsmith.errors import DataError, NumericError, Problem

RUN = """\
model = { type = "flux1", path = "flux1-dev.safetensors" }
[train]
steps = 100
[[data]]
type = "folder"
path = "cats"
[run]
dir = "runs/cats"
"""
HEAVY = ("torch", "transformers", "accelerate", "numpy", "safetensors", "PIL")


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    return "run.toml"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes the `version` verb raise."""

    def install(error: BaseException) -> None:
        def command() -> None:
            raise error

        monkeypatch.setattr("fluxsmith.cli.version.command", command)

    return install


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["help"]):
        assert cli.run(arguments) == 0
        text = capsys.readouterr().out
        assert "show" in text
        assert "print every value of a run file" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fluxsmith 0.")
    assert cli.run(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sohw"], "there is no command `sohw`. Fix: fluxsmith show"),
        (["zzz"], "there is no command `zzz`. Fix: fluxsmith --help lists the commands"),
        (["show"], "Missing argument 'RUN.TOML'. Fix: see fluxsmith show --help"),
        (["show", "x.toml", "--colour"], "No such option: --colour"),
    ],
)
def test_wrong_usage_is_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    assert f"error[config]: {message}" in capsys.readouterr().err


def test_groups_of_verbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = (verbs.Verb("lora show", "grouped", "an adapter"), verbs.Verb("lora gone", "gone", "not written"))
    monkeypatch.setattr(verbs, "VERBS", table)
    monkeypatch.setattr(cli, "VERBS", table)
    monkeypatch.setattr(verbs, "HERE", tmp_path)
    (tmp_path / "grouped.py").write_text('@app.command("show")\ndef anything(): ...\n')
    module = types.ModuleType("fluxsmith.cli.grouped")
    module.app = typer.Typer()
    module.app.callback()(lambda: None)
    module.app.command("show")(lambda word: print("seen", word))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for arguments in (["lora"], ["lora", "--help"]):
        assert cli.run(arguments) == 0
        assert capsys.readouterr().out.splitlines()[4:5] == ["  lora show  an adapter"]
    assert cli.run(["lora", "shwo"]) == 2
    assert "Fix: fluxsmith lora show" in capsys.readouterr().err
    assert cli.run(["lora", "gone"]) == 2
    assert "`lora gone` is not part of this version yet" in capsys.readouterr().err
    assert cli.run(["lora", "show", "me"]) == 0
    assert capsys.readouterr().out == "seen me\n"
    assert cli.run(["lora", "show"]) == 2
    assert "see fluxsmith lora show --help" in capsys.readouterr().err


def test_raw_verbs_get_their_arguments_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(verbs, "VERBS", (verbs.Verb("foreign", "show", "", raw=True),))
    monkeypatch.setattr(show, "command", lambda arguments: seen.extend(arguments) or 3)
    assert cli.run(["foreign", "--a=1", "-h", "--", "--debug"]) == 3
    assert seen == ["--a=1", "-h", "--", "--debug"]


def test_every_file_is_in_the_table() -> None:
    names = [verb.name for verb in verbs.VERBS]
    assert len(set(names)) == len(names)
    files = {file.stem for file in verbs.HERE.glob("*.py")} - {
        "__init__",
        "main",
        "verbs",
        "arguments",
        "progress",
        "drawing_options",
        "control_options",
    }
    assert {verb.file for verb in verbs.available()} == files


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("bad picture", where="a.png", fix="delete it"), 3, "error[data]: a.png: bad picture. Fix: delete it\n"),
        (NumericError("many", problems=(Problem("one"), Problem("two"))), 5, "error[numeric]: one\nerror[numeric]: two\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 7, "error[storage]: x.bin: No space left on device. Fix:"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_messages_and_exit_codes(
    error: BaseException, code: int, text: str, failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)
    assert cli.run(["version"]) == code
    shown = capsys.readouterr().err
    assert shown.startswith(text)
    assert "Traceback" not in shown


def test_a_bug_is_kept_in_a_file_and_shown_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    failing(ZeroDivisionError("by zero"))
    assert cli.run(["version"]) == 70
    shown = capsys.readouterr().err
    assert shown.startswith("error[bug]: ZeroDivisionError: by zero. The traceback is in ")
    assert "Traceback" not in shown
    assert "Traceback" in (tmp_path / cli.ERROR_LOG).read_text()
    assert cli.run(["version", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_show_prints_values_with_origins(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["show", run_file, "train.seed=3"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["train.steps"].split() == ["train.steps", "100", "run.toml:3:1"]
    assert rows["train.seed"].endswith("  command line")
    assert rows["noise.sampling"].endswith('"flux_shift"' + rows["noise.sampling"].partition('"flux_shift"')[2])
    assert cli.run(["show", run_file, "--json", "--changed"]) == 0
    listing = json.loads(capsys.readouterr().out)["values"]
    assert listing["data.0.path"] == {"value": "cats", "origin": "run.toml:6:1"}
    assert "noise.sampling" not in listing


def test_show_toml_is_a_run_file(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["show", run_file, "--toml"]) == 0
    Path("full.toml").write_text(capsys.readouterr().out)
    assert cli.run(["show", "full.toml", "--json"]) == 0


def test_config_errors_are_all_shown(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["show", run_file, "train.stepz=3", "noise.shift=-1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error[config]: command line") for line in lines)


@pytest.mark.parametrize("arguments", [["--help"], ["show", "run.toml"], ["show", "run.toml", "train.stepz=1"], ["show", "--help"]])
def test_nothing_heavy_is_imported(run_file: str, arguments: list[str]) -> None:
    code = (
        "import sys\nfrom fluxsmith.cli.main import run\n"
        f"run({arguments!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "[]"


def test_module_and_closed_pipe(run_file: str) -> None:
    command = f"{sys.executable} -m fluxsmith show {run_file} | head -n 1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1
