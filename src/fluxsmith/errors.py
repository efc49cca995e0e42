"""Every error that a user can meet, and the exit code each one ends a command with.

A message says what went wrong, where, why, and how to mend it:
`StorageError("cannot write the checkpoint", where="runs/cats", why="disk full", fix="free 1.2 GB")`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One finding of a check that reports everything at once (a config, a data set, a weights file).

    `where` is `file:line:column`, a file, or a key; `fix` is an instruction, not a hint.
    """

    what: str
    where: str = ""
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.why:
            text += f" ({self.why})"
        return f"{text}. Fix: {self.fix}" if self.fix else text


class FluxsmithError(Exception):
    """Base of all errors that fluxsmith raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 70
    kind = "error"

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "", problems: tuple[Problem, ...] = ()) -> None:
        self.problems = problems or (Problem(what, where, why, fix),)
        super().__init__(what if problems else str(self.problems[0]))

    def lines(self) -> list[str]:
        """The message as it is shown: one line a problem."""
        return [f"error[{self.kind}]: {problem}" for problem in self.problems]


class ConfigError(FluxsmithError):
    """Unknown key, wrong type, impossible pair, wrong usage."""

    exit_code, kind = 2, "config"


class DataError(FluxsmithError):
    """Pictures or captions that cannot be used."""

    exit_code, kind = 3, "data"


class ModelFileError(FluxsmithError):
    """A weights or tokenizer file that is missing, broken, or not what the role needs."""

    exit_code, kind = 4, "model"


class NumericError(FluxsmithError):
    """A loss or gradient that is not finite, or weights that may not be saved."""

    exit_code, kind = 5, "numeric"


class OutOfMemoryError(FluxsmithError):
    """Device or host memory is not enough; names the phase."""

    exit_code, kind = 6, "memory"


class StorageError(FluxsmithError):
    """Disk full, read-only folder, I/O failure."""

    exit_code, kind = 7, "storage"


class RunLockedError(FluxsmithError):
    """Another process holds the run folder."""

    exit_code, kind = 8, "locked"


class StopRequested(FluxsmithError):
    """Stopped on request (SIGINT, SIGTERM, a STOP file) with a resumable checkpoint on disk."""

    exit_code, kind = 75, "stopped"
