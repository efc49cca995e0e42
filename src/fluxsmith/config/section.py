"""The base of every typed section: unknown keys are refused, values do not change, docstrings are help texts."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of options. The string under a field is its documentation (docs, `--help`, JSON Schema)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class PluginConfig(Section):
    """Base of every plug-in's `Config`: `type` is the file name of the plug-in."""

    folder: ClassVar[str] = ""

    type: str = ""
    """The plug-in: the name of a file in the section's folder."""
