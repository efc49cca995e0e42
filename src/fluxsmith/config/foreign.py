"""Classes by dotted path: importing one runs foreign code, so a run file may name only those that the command line names too.

`fluxsmith train run.toml --plugin my_pkg.my_mod.MyOptimizer`; what torch itself brings needs no permission.
"""

import re

from pydantic import ValidationInfo

CONTEXT_KEY = "plugin_classes"
CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
OWN = re.compile(r"torch\.optim(\.lr_scheduler)?\.[A-Z]\w*")


def is_class_path(text: str) -> bool:
    """True for `package.module.Class`, as opposed to the path of a file."""
    return not text.endswith(".py") and CLASS_PATH.fullmatch(text) is not None


def check_allowed(path: str, info: ValidationInfo) -> str:
    """`path` itself if it may be imported; raises ValueError.

    Without a context a program writes the config, and what it names is its own affair; `load_config` always gives one.
    """
    if not is_class_path(path):
        raise ValueError(f"{path!r} is no package.module.Class")
    if info.context is None or OWN.fullmatch(path) or path in info.context.get(CONTEXT_KEY, ()):
        return path
    raise ValueError(f"a run file cannot have {path} imported: allow it on the command line, --plugin {path}")
