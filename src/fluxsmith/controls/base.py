"""What controls are made of: where one is built (Site), what it sees of a picture (Scene), what it gives (Conditioner, Prepared).

A control's file has `Config` (its weights and its pictures), a `Control` that `Config.build(site)` makes, and the Conditioner that
`Control.prepare(scene)` returns. Training and drawing use the same three.
"""

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from fluxsmith.config.choice import realise
from fluxsmith.config.control import ControlConfig
from fluxsmith.config.load import load_control
from fluxsmith.errors import ConfigError
from fluxsmith.models.assembly import Models, TextStates
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.stream import BlockHook, Conditioner, Stream, Tokens, Window

Net = TypeVar("Net", bound=nn.Module)
CHANNELS, APPENDED, TEXT, REGIONS = 10, 20, 30, 40  # order of conditioners: features, image tokens, text tokens, masks over all of them


@dataclass
class Site:
    """Where a control is built: beside this transformer, with its networks of this type on this device."""

    dit: FluxDiT
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    shared: dict[Hashable, nn.Module] = field(default_factory=dict)

    def once(self, key: Hashable, load: Callable[[], Net]) -> Net:
        """A network that several controls share (same file, same encoder) is loaded once."""
        if key not in self.shared:
            self.shared[key] = load().eval().requires_grad_(False)
        return self.shared[key]  # type: ignore[return-value]  # the key names the file and the class


@dataclass(frozen=True)
class Scene:
    """The picture that is about to be drawn, as controls see it. Tensors are made in batches of one."""

    models: Models
    width: int  # pixels
    height: int
    prompt: str
    negative: str | None  # None: there is no negative branch
    levels: tuple[float, ...]  # noise levels of the schedule, the last is 0
    device: torch.device
    dtype: torch.dtype  # of the transformer's inputs
    encode_text: Callable[[Sequence[str]], TextStates]
    encode: Callable[[Tensor], Tensor]  # pixels (1, 3, H, W) in [-1, 1] -> latents (1, 16, H/8, W/8) on the device
    work: Callable[..., None] = lambda *nets: None  # these networks are on the device from now on, until the next call of anything here
    clean: Tensor | None = None  # latents of the starting picture


class Prepared(NamedTuple):
    """What a control does in the two branches of guidance."""

    positive: Conditioner
    negative: Conditioner


def both(conditioner: Conditioner) -> Prepared:
    """The same in both branches."""
    return Prepared(conditioner, conditioner)


class Control:
    """A loaded control with what it was given. `given(image=...)` is the same one with other pictures."""

    role = "control"
    loads: tuple[str, ...] = ("path",)  # options that decide which weights are read

    def __init__(self, config: ControlConfig, nets: Sequence[nn.Module] = (), denoising: Sequence[nn.Module] | None = None) -> None:
        """`nets` are its networks; those of `denoising` (all by default) are used by every forward, the others by `prepare` alone."""
        self.config: Any = config
        self.nets = tuple(nets)
        self.denoising = self.nets if denoising is None else tuple(denoising)

    @property
    def name(self) -> str:
        """How requests and messages call it."""
        return self.config.name or self.role

    @property
    def added_tokens(self) -> int:
        """How many text and image tokens it adds to a picture, for the reckoning of memory."""
        return 0

    def given(self, **options: Any) -> Self:
        """The same networks with other options. Raises ConfigError for one that decides which weights are read, and for what is wrong."""
        fixed = sorted(set(options) & set(self.loads))
        if fixed:
            raise ConfigError(f"{self.name}.{fixed[0]} is fixed when the model is loaded", fix="load the pipeline anew")
        other = copy.copy(self)
        values = {**self.config.model_dump(), **options}
        other.config = realise(load_control({**values, "type": self.config.type or self.role}))
        return other

    def prepare(self, scene: Scene) -> Prepared:
        """Ready for one picture: encoders run here, once."""
        raise NotImplementedError

    def conditioner(self, models: Models, pixels: Tensor | None) -> Conditioner:
        """Ready for a training batch with condition pictures (B, 3, H, W) in [-1, 1]."""
        raise ConfigError(f"{self.role} cannot be used in training yet", fix="train without this [[control]]")


class Unchanged:
    """A Conditioner that does nothing; controls override what they need."""

    order = CHANNELS

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens."""
        return tokens

    def hooks(self, tokens: Tokens) -> Sequence[BlockHook]:
        """As Conditioner.hooks."""
        return ()

    def at(self, sigma: float) -> Conditioner | None:
        """As Conditioner.at."""
        return self

    def tile(self, window: Window) -> Conditioner:
        """As Conditioner.tile; right for whatever does not belong to places of the picture."""
        return self

    def correct(self, v: Tensor, x: Tensor, sigma: float) -> Tensor:
        """As Conditioner.correct."""
        return v


class ResidualHook(BlockHook):
    """Adds `residual(index)` (B, n_target, D) to the image stream after a block; None adds nothing."""

    def __init__(self, residual: Callable[[int], Tensor | None]) -> None:
        self.residual = residual

    def after(self, index: int, stream: Stream) -> Stream:
        """As BlockHook.after; tokens that other controls appended are left alone."""
        added = self.residual(index)
        if added is None:
            return stream
        rest = stream.img.shape[1] - added.shape[1]
        padded = torch.nn.functional.pad(added, (0, 0, 0, rest)) if rest else added
        return stream._replace(img=stream.img + padded.to(stream.img.dtype))
