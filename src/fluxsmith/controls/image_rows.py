"""What controls add to the image of a transformer's input: features beside the denoised ones, or tokens behind them."""

import torch
from torch import Tensor

from fluxsmith.models.packing import pack
from fluxsmith.models.stream import Tokens, Window


def with_features(tokens: Tokens, latents: Tensor) -> Tokens:
    """The input with latents (1 or B, C, h, w) packed beside the denoised ones: 4C more features a token."""
    b, n, _ = tokens.img.shape
    added = pack(latents).to(tokens.img)
    if added.shape[1] != n:
        raise ValueError(f"{added.shape[1]} tokens of features for {n} tokens of the picture")
    return tokens._replace(img=torch.cat((tokens.img, added.expand(b, -1, -1)), dim=-1))


def with_image(tokens: Tokens, rows: Tensor, ids: Tensor) -> Tokens:
    """The input with image tokens (1 or B, S, C) and ids (1 or B, S, 3) behind those that are denoised; all may attend to them."""
    b, n, _ = tokens.img.shape
    mask = tokens.mask
    return tokens._replace(
        img=torch.cat((tokens.img, rows.to(tokens.img).expand(b, -1, -1)), dim=1),
        img_ids=torch.cat((tokens.img_ids, ids.to(tokens.img_ids).expand(b, -1, -1)), dim=1),
        mask=None if mask is None else torch.cat((mask, mask.new_ones(*mask.shape[:-1], rows.shape[1])), dim=-1),
        n_target=tokens.n_target or n,
    )


def part(latents: Tensor, window: Window) -> Tensor:
    """A window of latents (B, C, h, w)."""
    return latents[..., window.top : window.top + window.height, window.left : window.left + window.width]
