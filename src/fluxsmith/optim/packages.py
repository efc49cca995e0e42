"""Optimizers of other packages: imported when a run is built, with an error that says what to install or to write otherwise."""

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fluxsmith.config.optimizer import unknown_option
from fluxsmith.errors import ConfigError
from fluxsmith.optim.groups import Group, as_torch_groups


def package_class(module: str, name: str, *, package: str = "", extra: str = "optim") -> Any:
    """`module.name`; raises ConfigError if the package is not installed or has no such class."""
    package = package or module.partition(".")[0]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        fix = f"pip install 'fluxsmith[{extra}]' (or pip install {package})" if extra else f"pip install the package that has {module}"
        raise ConfigError(f"the optimizer needs the package {package}", why=str(error), fix=fix) from error
    kind = getattr(found, name, None)
    if kind is None:
        nearest = difflib.get_close_matches(name, dir(found), 1, 0.6)
        fix = f"write {module}.{nearest[0]}" if nearest else "look up its name, or install the version in constraints.txt"
        raise ConfigError(f"{module} has no {name}", fix=fix)
    return kind


def accepted(kind: Any) -> tuple[str, ...] | None:
    """Names of the arguments of a class beside parameters, rate and decay; None if it takes any name."""
    parameters = inspect.signature(kind).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    return tuple(one.name for one in parameters if one.name not in ("params", "lr", "weight_decay"))


def construct(kind: Any, groups: Iterable[Group], lr: float, arguments: Mapping[str, Any], *, label: str) -> torch.optim.Optimizer:
    """The optimizer over the groups; raises ConfigError for an argument that the class does not have or refuses."""
    known = accepted(kind)
    for key in arguments:
        if known is not None and key not in (*known, "weight_decay"):
            raise ConfigError(f"optim.options: {unknown_option(label, key, known)}", fix="correct optim.options")
    try:
        return kind(as_torch_groups(groups, lr), lr=lr, **arguments)
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"{label} does not take these options", why=str(error), fix="correct [optim]") from error


def takes(kind: Any, name: str) -> bool:
    """Does the class have this argument?"""
    return name in inspect.signature(kind).parameters
