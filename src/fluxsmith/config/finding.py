"""A broken rule of a config, before it is known where in a file its option stands.

`Finding(("data", 0, "batch_size"), "data.0 and data.1 share batches of different sizes", "write the same batch_size in both")`
"""

from typing import NamedTuple

from fluxsmith.config.sections import KeyPath


class Finding(NamedTuple):
    """One broken rule; `key` is the option that the cure names first."""

    key: KeyPath
    what: str
    fix: str
    why: str = ""
