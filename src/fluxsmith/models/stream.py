"""What flows through a FLUX transformer (seams 1 to 4): tokens in, a stream between blocks, hooks on the way.

NamedTuples, so that every tree walker sees the tensors inside and nothing is changed in place.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Tokens(NamedTuple):
    """The model's input (seam 1). Image tokens that a control appends come after the `n_target` denoised ones."""

    img: Tensor  # (B, N, C) packed latents
    img_ids: Tensor  # (B, N, 3) axis, row, column
    txt: Tensor  # (B, T, D_txt)
    txt_ids: Tensor  # (B, T, 3)
    y: Tensor  # (B, D_pooled)
    t: Tensor  # (B,) noise level in [0, 1]
    guidance: Tensor | None = None  # (B,)
    mask: Tensor | None = None  # bool, broadcasts to (B, H, T+N, T+N); True may attend
    n_target: int = 0  # 0: all image tokens
    n_prompt: int = 0  # text tokens that belong to the prompt, at the end of the text; 0: all


class IpTokens(NamedTuple):
    """Extra keys and values that image queries attend to (seam 3), set by a BlockHook for one block."""

    key: Tensor  # (B, H, S, D)
    value: Tensor  # (B, H, S, D)
    scale: Tensor  # 0-dim
    after_block: bool = False  # True: add to the image stream at the end (XLabs); False: to the attention output (InstantX)


class Stream(NamedTuple):
    """The state between two blocks (seam 2)."""

    img: Tensor  # (B, N, D)
    txt: Tensor  # (B, T, D)
    vec: Tensor  # (B, D) conditioning vector, or (B, rows, D) table of modulations
    pe: Tensor  # (B, 1, T+N, head/2, 2) rotary table
    mask: Tensor | None = None
    ip: tuple[IpTokens, ...] = ()
    kept: Tensor | None = None  # which image tokens are present while tokens are routed
    parked: Tensor | None = None  # the full image stream to return to
    n_target: int = 0


class BlockHook:
    """Sees the stream before and after every block; the default changes nothing.

    Hooks are made for one forward, keep no state, and never write in place. Blocks count 0..n-1, double ones first.
    """

    def before(self, index: int, stream: Stream) -> Stream:
        """The stream that block `index` will see."""
        return stream

    def after(self, index: int, stream: Stream) -> Stream:
        """The stream that the next block will see."""
        return stream


class Window(NamedTuple):
    """A part of the picture that is denoised by itself, in latent cells (even numbers); `rows` and `columns` are the whole picture's."""

    top: int
    left: int
    height: int
    width: int
    rows: int
    columns: int


class Conditioner(Protocol):
    """A control made ready for one batch or picture: changes the input (seam 1) and watches the blocks (seams 2, 3)."""

    order: int
    """Conditioners act in this order; those that look at all tokens come last."""

    def tokens(self, tokens: Tokens) -> Tokens:
        """The input with what the control adds; everything it does not know stays."""
        ...

    def hooks(self, tokens: Tokens) -> Sequence[BlockHook]:
        """Hooks for one forward on these tokens."""
        ...

    def at(self, sigma: float) -> "Conditioner | None":
        """What acts at a noise level of the schedule; None where it is switched off."""
        ...

    def tile(self, window: Window) -> "Conditioner":
        """The same for a part of the picture."""
        ...

    def correct(self, v: Tensor, x: Tensor, sigma: float) -> Tensor:
        """The branch's prediction v (B, 16, h, w) at latents x, before guidance combines the branches."""
        ...
