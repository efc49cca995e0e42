"""What a family tells the loader beyond its files: roles, text length, masks. Each `Config.facts()` in this folder returns one."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class FamilyFacts(NamedTuple):
    """One member of a family."""

    name: str
    """The family, in the words of `model identify`."""
    variant: str
    """The member, as metadata names it."""
    text_roles: tuple[str, ...]
    """Text encoders, in loading order."""
    t5_length: int
    """T5 tokens a caption is padded to."""
    mask_text: bool
    """True if padding is hidden from attention."""
    bundle: str = ""
    """Where the files are when none are given."""
    implies: Mapping[str, Any] = MappingProxyType({})
    """The `[[control]]` section that the model always has, with the files it takes from the model section."""

    @property
    def roles(self) -> tuple[str, ...]:
        """All parts, the transformer first."""
        return ("dit", *self.text_roles, "ae")
