"""The base of every typed section: unknown keys are refused, values do not change, docstrings are help texts."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """A frozen group of options. The string under a field is its documentation (docs, `--help`, JSON Schema)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="after")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return value.expanduser() if isinstance(value, Path) else value


class PluginConfig(Section):
    """Base of every plug-in's `Config`: `type` is the file name of the plug-in."""

    folder: ClassVar[str] = ""
    file: ClassVar[Path | None] = None  # of a plug-in that was named with --plugin

    type: str = ""
    """The plug-in: the name of a file in the section's folder."""
