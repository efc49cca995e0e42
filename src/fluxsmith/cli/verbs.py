"""The verb table: name -> where its function is, and one line of help. Verb modules are imported when they are called.

To add a verb, write its row and its file `cli/<verb>.py` with a function `command`; the verbs of a group (`lora merge`) share a
file with a `typer.Typer` called `app` and one `@app.command("merge")` each. A row without its function is not shown.
"""

from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Verb(NamedTuple):
    """One row; `file` is the module in this folder. A raw verb gets its arguments as they are (foreign front ends)."""

    name: str
    file: str
    help: str
    raw: bool = False

    @property
    def module(self) -> str:
        """Dotted name of the module."""
        return f"fluxsmith.cli.{self.file}"

    @property
    def member(self) -> str:
        """`merge` of `lora merge`; empty for a verb that is no member of a group."""
        return self.name.partition(" ")[2]

    @property
    def exists(self) -> bool:
        """True when the file has the verb; nothing is imported."""
        path = HERE / f"{self.file}.py"
        wanted = f'@app.command("{self.member}"' if self.member else "\ndef command("
        return path.is_file() and wanted in path.read_text(encoding="utf-8")


VERBS = (
    Verb("demo", "demo", "train a tiny model's adapter on this machine and show the pictures"),
    Verb("doctor", "doctor", "check the machine, the libraries and the model files"),
    Verb("train", "train", "run a training: fluxsmith train run.toml [train.steps=500 ...]"),
    Verb("generate", "generate", "make pictures"),
    Verb("cache", "cache", "encode pictures and captions before a training"),
    Verb("validate", "validate", "measure the loss of a run on held-out pictures"),
    Verb("data scan", "data", "find every problem of a data set"),
    Verb("data preview", "data", "show what training sees of a data set"),
    Verb("data caption", "data", "write captions"),
    Verb("lora inspect", "lora", "what an adapter file is and holds"),
    Verb("lora check", "lora", "where an adapter file loads"),
    Verb("lora weights", "lora", "figures of each weight of a file"),
    Verb("lora convert", "lora_edit", "write an adapter in another format"),
    Verb("lora merge", "lora_make", "merge adapters into a model or with each other"),
    Verb("lora extract", "lora_make", "an adapter from the difference of two models"),
    Verb("lora resize", "lora_edit", "change the rank of an adapter"),
    Verb("model identify", "model", "what a weights file is"),
    Verb("model convert", "model_make", "write a model as one file in the original names"),
    Verb("model merge", "model_make", "the weighted sum of models"),
    Verb("model fetch", "model", "download a model's files"),
    Verb("model quantize", "model", "write a model in fewer bits"),
    Verb("plan", "plan", "what a run needs before it starts"),
    Verb("show", "show", "print every value of a run file with its origin"),
    Verb("translate", "translate", "turn another trainer's command into a run file", raw=True),
    Verb("configure", "configure", "write a run file by answering questions"),
    Verb("bench", "bench", "measure steps and memory"),
    Verb("serve", "serve", "the web page"),
    Verb("version", "version", "versions of fluxsmith, Python and the libraries"),
    Verb("sd-scripts", "sd_scripts", "run an sd-scripts command line", raw=True),
    Verb("simpletuner", "simpletuner", "run a SimpleTuner configuration", raw=True),
    Verb("diffsynth", "diffsynth", "run a DiffSynth-Studio command line", raw=True),
)


def available() -> tuple[Verb, ...]:
    """The verbs that this version has."""
    return tuple(verb for verb in VERBS if verb.exists)
