"""What started the run may ask for shares too: `distributed.config`, or accelerate's environment. The run file's own words come first."""

from typing import Any

from fluxsmith.config.rules import findings
from fluxsmith.config.schema import RunConfig
from fluxsmith.config.sections import dotted
from fluxsmith.errors import ConfigError, Problem
from fluxsmith.io.launcher import launch_of_environment, read_launch


def launched(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The config with what the launcher asks for, where the run file leaves it open, and notes. Raises ConfigError."""
    path = config.distributed.config
    launch = read_launch(path) if path is not None else launch_of_environment()
    if not launch.changes and path is None:
        return config, []
    given, notes = config.model_dump(exclude_defaults=True), list(launch.notes)
    sections: dict[str, dict[str, Any]] = {"distributed": {"config": None}}
    for key, value in launch.changes.items():
        section, _, name = key.partition(".")
        own = given.get(section, {}).get(name)
        if own is None or own == "auto":
            sections.setdefault(section, {})[name] = value
        elif own != value:
            notes.append(f"{key} = {own!r} of the run file holds, the launcher says {value!r}")
    made = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    changed = config.model_copy(update=made)
    broken = findings(changed)
    if broken:
        where = str(path) if path is not None else "accelerate launch"
        problems = tuple(
            Problem(finding.what, where=f"{dotted(finding.key)} ({where})", fix=finding.fix, why=finding.why) for finding in broken
        )
        raise ConfigError("what the launcher asks for does not go with the run file", problems=problems)
    return changed, notes
