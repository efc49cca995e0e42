"""`fluxsmith translate sd-scripts NAME ARGS`: the run file that another trainer's command means, and what became of its options."""

import json
import sys
from collections.abc import Sequence

from fluxsmith.config.dump import to_toml
from fluxsmith.config.schema import as_plain
from fluxsmith.dialects.sd_scripts.lower import Lowered, lower
from fluxsmith.errors import ConfigError

HELP = """usage: fluxsmith translate [--json] sd-scripts SCRIPT OPTIONS > run.toml

Print the run file that a training command of sd-scripts means. The report (options without effect, defaults to think about)
goes to the screen; with --json both are one object.

Example: fluxsmith translate sd-scripts flux_train_network.py --config_file my_options.toml > run.toml"""
DIALECTS = ("sd-scripts",)


def command(arguments: Sequence[str]) -> int:
    """Translate one command line; the run file goes to standard output."""
    words = [word for word in arguments if word != "--json"]
    if not words or words[0] in ("--help", "-h"):
        print(HELP)
        return 0
    if words[0] not in DIALECTS:
        raise ConfigError(f"{words[0]!r} is no trainer that can be translated", fix=f"name one of {', '.join(DIALECTS)}")
    lowered = lower(words[1:])
    if "--json" in arguments:
        print(json.dumps(_record(lowered), indent=1))
        return 0
    print(to_toml(lowered.config, only_set=True), end="")
    for line in lowered.report.lines():
        print(line, file=sys.stderr)
    return 0


def _record(lowered: Lowered) -> dict[str, object]:
    plain = as_plain(lowered.config)
    return {"script": lowered.script.name, "config": plain, "report": lowered.report.as_record(), "resume": lowered.resume}
