"""`fluxsmith <verb> ...`: finds the verb, calls it, and turns every error into a message and an exit code in one place.

Nothing heavy is imported before a verb is known to need it; `--debug` shows tracebacks.
"""

import difflib
import errno
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.exceptions import TyperException

import fluxsmith
from fluxsmith.cli.verbs import VERBS, Verb, available
from fluxsmith.errors import ConfigError, FluxsmithError, StorageError

BUG, INTERRUPTED = 70, 130
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
ERROR_LOG = "fluxsmith-error.log"


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    words = list(arguments)
    debug = bool(words) and "--debug" in words[: words.index("--") if "--" in words else None]
    if debug:
        words.remove("--debug")
    try:
        return _dispatch(words)
    except FluxsmithError as error:
        return _report(error, debug)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of `fluxsmith show run.toml | head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in DISK_ERRORS:
            fix = "free space, or write to another folder"
            return _report(StorageError(error.strerror or str(error), where=str(error.filename or ""), fix=fix), debug)
        return _bug(error, debug)
    except Exception as error:  # noqa: BLE001  whatever else happens is a bug: keep the traceback, show a short message
        return _bug(error, debug)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_help(""))
        return 0
    if words[0] == "--version":
        print(f"fluxsmith {fluxsmith.__version__}")
        return 0
    verb, rest = _find(words)
    if verb is None:
        print(_help(words[0]))
        return 0
    module = importlib.import_module(verb.module)
    code = int(module.command(rest) or 0) if verb.raw else _call(verb, module, rest)
    sys.stdout.flush()
    return code


def _call(verb: Verb, module: Any, arguments: list[str]) -> int:
    if verb.member:
        app, name, words = module.app, verb.name.partition(" ")[0], [verb.member, *arguments]
        app.pretty_exceptions_enable = False
    else:
        app, name, words = typer.Typer(add_completion=False, pretty_exceptions_enable=False), verb.name, arguments
        app.command(help=None if module.command.__doc__ else verb.help)(module.command)
    try:
        result = typer.main.get_command(app).main(args=words, prog_name=f"fluxsmith {name}", standalone_mode=False)
    except TyperException as error:
        raise ConfigError(error.format_message().rstrip("."), fix=f"see fluxsmith {verb.name} --help") from None
    except SystemExit as error:  # what typer makes of a closed pipe
        if isinstance(error.__context__, BrokenPipeError):
            raise error.__context__ from None
        raise
    return result if isinstance(result, int) else 0


def _find(words: list[str]) -> tuple[Verb | None, list[str]]:
    """The verb that the words begin with; None for the name of a group (`lora`) alone or with --help."""
    verbs = {verb.name: verb for verb in available()}
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in verbs:
            return verbs[name], words[length:]
    group = [name for name in verbs if name.startswith(f"{words[0]} ")]
    if group and (len(words) == 1 or words[1] in ("--help", "-h")):
        return None, []
    asked = " ".join(words[:2]) if group else words[0]
    if any(verb.name in (words[0], " ".join(words[:2])) for verb in VERBS):
        raise ConfigError(f"`{asked}` is not part of this version yet", fix="fluxsmith --help lists what is")
    nearest = difflib.get_close_matches(asked, group or list(verbs), 1, 0.5)
    fix = f"fluxsmith {nearest[0]}" if nearest else "fluxsmith --help lists the commands"
    raise ConfigError(f"there is no command `{asked}`", fix=fix)


def _help(group: str) -> str:
    rows = [verb for verb in available() if not group or verb.name.startswith(f"{group} ")]
    width = max(len(verb.name) for verb in rows)
    lines = [f"usage: fluxsmith {group + ' ' if group else ''}COMMAND ...", "", "Train and run FLUX.1 models.", ""]
    lines += [f"  {verb.name:<{width}}  {verb.help}" for verb in rows]
    return "\n".join([*lines, "", "fluxsmith COMMAND --help says more; --debug shows tracebacks; --version."])


def _report(error: FluxsmithError, debug: bool) -> int:
    for line in error.lines():
        print(line, file=sys.stderr)
    if debug:
        traceback.print_exception(error)
    return error.exit_code


def _bug(error: Exception, debug: bool) -> int:
    text = "".join(traceback.format_exception(error))
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        log = folder / ERROR_LOG
        try:
            log.write_text(f"fluxsmith {fluxsmith.__version__}: {' '.join(sys.argv)}\n{text}", encoding="utf-8")
        except OSError:
            continue
        break
    else:
        log, debug = Path(), True  # nowhere to write: show it
    print(f"error[bug]: {type(error).__name__}: {error}. The traceback is in {log}. Fix: report it with that file", file=sys.stderr)
    if debug:
        print(text, file=sys.stderr)
    return BUG


if __name__ == "__main__":
    main()
