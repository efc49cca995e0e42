"""What every `[[control]]` section has: its name, pictures as options, and what is known about a picture before weights are read.

`image: Picture` takes a file's path, and in Python a picture of Pillow too; `images: Pictures` one of them or a list.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import Problem


def _picture(value: Any) -> Any:
    if isinstance(value, str | Path) and str(value):
        return Path(value).expanduser()
    if hasattr(value, "convert") and hasattr(value, "size"):
        return value
    raise ValueError("a picture is the path of a file, or in Python a picture of Pillow")


def _several(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Path) else f"picture of {value.size[0]} x {value.size[1]}"


Picture = Annotated[
    Any, BeforeValidator(_picture), PlainSerializer(_shown, when_used="json"), WithJsonSchema({"type": "string", "format": "path"})
]
Pictures = Annotated[tuple[Picture, ...], BeforeValidator(_several)]


class Ground(NamedTuple):
    """What is known of the model and of the picture that is asked for, before any weight is read."""

    family: str = "flux1"
    in_channels: int = 64
    """Features of an image token that the transformer takes: 64, 128 (canny, depth), 196 (Flex.2) or 384 (Fill)."""
    roles: tuple[str, ...] = ("dit", "clip_l", "t5xxl", "ae")
    """Parts of the model that there are."""
    width: int = 1024
    height: int = 1024
    cfg: float = 1.0
    """True guidance; 1 means that there is no negative branch."""
    has_image: bool = False
    """There is a starting picture."""
    others: tuple[str, ...] = ()
    """Types of the other controls."""
    implies: Mapping[str, Any] = MappingProxyType({})
    """A `[[control]]` section that the model's family always has."""


class ControlConfig(PluginConfig):
    """One control model, and what it is given."""

    masks_attention: ClassVar[bool] = False  # attention needs a back-end that takes a mask

    name: str = ""
    """What requests and messages call it; by default its type."""

    def natural_size(self, side: int) -> tuple[int, int] | None:
        """Width and height of the picture that is drawn where nobody asks for one; `side` squared is the model's usual number of pixels."""
        return None

    def misfits(self, ground: Ground) -> Iterator[Problem]:
        """What of the model or of the other controls this one does not go with; told before weights are read."""
        yield from ()

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """What is wrong with the pictures and numbers of a request; told before encoders run."""
        yield from ()
