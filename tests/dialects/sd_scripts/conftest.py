"""Commands of sd-scripts on small files: a folder of pictures, a dataset file, and a base command that lowers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_run import write_pictures

from fluxsmith.dialects.base import Report
from fluxsmith.dialects.sd_scripts.lower import fill
from fluxsmith.dialects.sd_scripts.lower_model import is_chroma
from fluxsmith.dialects.sd_scripts.options import read_options
from fluxsmith.dialects.sd_scripts.scripts import split_command
from fluxsmith.errors import Problem

DATASET = """[general]
caption_extension = ".txt"
enable_bucket = true

[[datasets]]
resolution = 512

  [[datasets.subsets]]
  image_dir = "pictures"
"""


class Filled(NamedTuple):
    """What a command says, before the run's own rules are asked."""

    tree: dict[str, Any]
    report: Report
    problems: list[Problem]

    @property
    def noted(self) -> str:
        return "\n".join(self.report.lines())

    @property
    def refused(self) -> str:
        return "\n".join(map(str, self.problems))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the current one, with pictures and a dataset file."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures", 4)
    (tmp_path / "data.toml").write_text(DATASET)
    return tmp_path


def base(script: str = "flux_train_network") -> list[str]:
    """The smallest command that asks for a run."""
    words = [script, "--pretrained_model_name_or_path", "flux1-dev.safetensors", "--clip_l", "clip_l.safetensors"]
    words += ["--t5xxl", "t5xxl.safetensors", "--ae", "ae.safetensors", "--output_dir", "out", "--output_name", "cats"]
    words += ["--dataset_config", "data.toml"]
    return [*words, "--network_module", "networks.lora_flux"] if script == "flux_train_network" else words


def filled(words: Sequence[str]) -> Filled:
    """The tree of a command, its report, and what it cannot do."""
    script, rest, _ = split_command(words)
    draft = read_options(script, rest)
    fill(draft, "chroma" if is_chroma(draft) else "flux1")
    return Filled(draft.tree, draft.report, draft.problems)


@pytest.fixture
def command(work: Path) -> Callable[..., Filled]:
    """`command("--network_dim", "8")`: the base command with more options."""

    def run(*words: str, script: str = "flux_train_network") -> Filled:
        return filled([*base(script), *words])

    return run


@pytest.fixture
def base_words(work: Path) -> list[str]:
    """The base command itself."""
    return base()
