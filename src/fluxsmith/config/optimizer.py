"""Options every optimizer has. A plug-in's `Config` adds its own, or takes the class's arguments through `options`.

`options` is checked when the run file is read, by the names that the plug-in lists, so that a misspelling costs no minutes.
"""

import difflib
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from fluxsmith.config.section import PluginConfig

OptionValue = bool | int | float | str | tuple[float, ...] | None

# What users write -> what the class calls it, where the class has the latter and not the former.
ALIASES = {
    "decouple": "weight_decouple",
    "weight_decouple": "decouple",
    "decoupled_decay": "decouple",
    "use_bias_correction": "bias_correction",
    "bias_correction": "use_bias_correction",
    "epsilon": "eps",
}


class OptimizerConfig(PluginConfig):
    """What the trainer asks of every optimizer."""

    lr: PositiveFloat = 1e-4
    """Learning rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay."""

    def is_per_tensor(self) -> bool:
        """True where the update of a tensor depends on no other tensor, so that `memory.fused_update` can make it alone."""
        return True

    def has_one_rate(self) -> bool:
        """True where all groups must have the same learning rate."""
        return False

    def require(self) -> None:
        """Raise ConfigError if the package of the optimizer is not installed: asked before anything large is loaded."""

    def uses_schedule(self) -> bool:
        """False where the optimizer finds its rate without `lr` and `schedule`."""
        return True


class OptionsConfig(OptimizerConfig):
    """An optimizer whose further arguments come through `options`."""

    options: dict[str, OptionValue] = {}
    """Further arguments, for example `{ betas = [0.9, 0.99], eps = 1e-6 }`."""

    def option_names(self) -> tuple[str, ...]:
        """Arguments that `options` may hold; empty where only the class itself can tell."""
        return ()

    def label(self) -> str:
        """How messages call the optimizer."""
        return str(self.model_dump().get("name") or self.type)

    def arguments(self) -> dict[str, Any]:
        """`options` under the names that the class uses."""
        known = self.option_names()
        return {_known_name(key, known) or key: value for key, value in self.options.items()}

    @model_validator(mode="after")
    def _options_exist(self) -> "OptionsConfig":
        known = self.option_names()
        problems = [_problem(self.label(), key, value, known) for key, value in self.options.items() if not _known_name(key, known)]
        if known and problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self


def _known_name(key: str, known: tuple[str, ...]) -> str:
    alias = ALIASES.get(key, "")
    return key if key in known else alias if alias in known else ""


def _problem(label: str, key: str, value: Any, known: tuple[str, ...]) -> InitErrorDetails:
    return InitErrorDetails(
        type=PydanticCustomError("option_unknown", "{text}", {"text": unknown_option(label, key, known)}), loc=("options", key), input=value
    )


def unknown_option(label: str, key: str, known: tuple[str, ...]) -> str:
    """The message about an option that does not exist, with the nearest one or all of them."""
    if key in ("lr", "weight_decay"):
        return f"{key} stands outside of options: write optim.{key}"
    nearest = difflib.get_close_matches(key, known, 1, 0.6)
    cure = f"write {nearest[0]}" if nearest else f"it has {', '.join(known)}"
    return f"{label} has no option {key}: {cure}"
