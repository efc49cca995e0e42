"""A training command of sd-scripts -> a checked run config and a report.

`lower(["flux_train_network.py", "--dataset_config", "cats.toml", ...]).config`. Options with a straight place are put there by
their rows; the functions below place the others, in this order, because later ones look at what earlier ones wrote.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.dialects.base import Draft, Report
from fluxsmith.dialects.sd_scripts import lower_adapter, lower_distributed, lower_model, lower_optim, lower_run
from fluxsmith.dialects.sd_scripts.dataset import dataset
from fluxsmith.dialects.sd_scripts.options import read_options
from fluxsmith.dialects.sd_scripts.scripts import Script, split_command
from fluxsmith.errors import ConfigError, Problem

SECTIONS = (
    "model",
    "adapter",
    "base_adapters",
    "quant",
    "control",
    "optim",
    "schedule",
    "objective",
    "noise",
    "memory",
    "distributed",
    "train",
)
STEPS: tuple[Callable[[Draft], None], ...] = (
    lower_model.model,
    lower_model.tokenizers,
    lower_model.precision,
    lower_model.caches,
    lower_adapter.adapter,
    lower_adapter.text_encoders,
    lower_adapter.start_weights,
    lower_adapter.base_weights,
    lower_model.control,
    lower_model.fp8,
    lower_model.checkpointing,
    lower_model.swap,
    lower_model.fused,
    lower_distributed.deepspeed,
    lower_optim.optimizer,
    lower_optim.schedule,
    lower_run.loss,
    lower_run.weighting,
    lower_run.timestep_range,
    lower_run.length,
    lower_run.seed,
    dataset,
    lower_run.output,
    lower_run.file_format,
    lower_run.checkpoints,
    lower_run.states,
    lower_run.resume,
    lower_run.metadata,
    lower_run.samples,
    lower_run.validation,
    lower_run.logging,
)
ALWAYS = ("loss", "weighting", "seed", "output")  # also where no option of the script names them


@dataclass(frozen=True)
class Lowered:
    """What a command means: the run, what became of its options, and the state it continues."""

    script: Script
    config: RunConfig
    tree: dict[str, Any]
    report: Report
    resume: str = ""


def lower(words: Sequence[str]) -> Lowered:
    """The run that a command line describes. Raises ConfigError with everything that cannot be done."""
    script, rest, launcher = split_command(words)
    if script.kind != "train":
        raise ConfigError(f"{script.name} trains nothing", fix="translate flux_train_network, flux_train or flux_train_control_net")
    draft = read_options(script, rest)
    if launcher:
        draft.note(
            "",
            f"the words of `{launcher}` are not used: for several cards write accelerate launch -m fluxsmith sd-scripts {script.name} ...",
        )
    return lower_draft(script, draft)


def lower_draft(script: Script, draft: Draft) -> Lowered:
    """The same from options that have been read."""
    fill(draft, "chroma" if lower_model.is_chroma(draft) else "flux1")
    draft.finish(f"{script.name}")
    tree = {key: value for key, value in draft.tree.items() if value not in ({}, [])}
    try:
        config = load_config(tree, plugin_files=_classes(draft)).config
    except ConfigError as error:
        problems = tuple(_traced(draft, problem) for problem in error.problems)
        raise ConfigError("\n".join([f"{script.name} cannot be run:", *map(str, problems)]), problems=problems) from None
    return Lowered(script, config, tree, draft.report, str(draft["resume"] or ""))


def _classes(draft: Draft) -> list[str]:
    """Classes that the command line names, and so allows."""
    return [str(path) for path in (draft.get("optim.class"), draft.get("schedule.class")) if path]


def fill(draft: Draft, family: str) -> None:
    """The tree of a draft, by the rows and then the functions that the script's rows name."""
    draft.tree = {section: {} for section in SECTIONS}
    draft.put("model.type", family, "--model_type")
    draft.apply_rows()
    wanted = {row.by for row in draft.rows.values() if row.fate == "kept"} | set(ALWAYS)
    for step in STEPS:
        if step.__name__ in wanted:
            step(draft)


def _traced(draft: Draft, problem: Problem) -> Problem:
    """A finding about a native option, with the option of sd-scripts that it comes from."""
    keys = sorted((key for key in draft.origins if key in f"{problem.what} {problem.where}"), key=len, reverse=True)
    return replace(problem, where=draft.origins[keys[0]] if keys else "")
