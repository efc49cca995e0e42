"""Rows that controls add to the text of a transformer's input, or put in its place: with their ids and their part of the mask."""

import torch
from torch import Tensor

from fluxsmith.models.stream import Tokens


def with_rows(tokens: Tokens, rows: Tensor, ids: Tensor | None = None) -> Tokens:
    """The input with rows (1 or B, S, D_txt) behind its text; ids (1 or B, S, 3), zero by default. They belong to the prompt."""
    b, length = tokens.txt.shape[:2]
    rows = rows.to(tokens.txt).expand(b, -1, -1)
    added = tokens.txt_ids.new_zeros(1, rows.shape[1], 3) if ids is None else ids.to(tokens.txt_ids)
    return tokens._replace(
        txt=torch.cat((tokens.txt, rows), dim=1),
        txt_ids=torch.cat((tokens.txt_ids, added.expand(b, -1, -1)), dim=1),
        mask=None if tokens.mask is None else _seen(tokens.mask, length, rows.shape[1]),
        n_prompt=tokens.n_prompt and tokens.n_prompt + rows.shape[1],
    )


def with_text(tokens: Tokens, rows: Tensor, ids: Tensor | None = None, *, y: Tensor | None = None) -> Tokens:
    """The input with these rows as its whole text, and with another pooled state y (1 or B, D) where one is given."""
    mask, length = tokens.mask, tokens.txt.shape[1]
    empty = tokens._replace(
        txt=tokens.txt[:, :0], txt_ids=tokens.txt_ids[:, :0], mask=None if mask is None else mask[..., length:], n_prompt=0
    )
    made = with_rows(empty, rows, ids)
    return made if y is None else made._replace(y=y.to(tokens.y).expand(tokens.y.shape[0], -1))


def _seen(mask: Tensor, place: int, count: int) -> Tensor:
    """Key mask (B, 1, 1, T+N) with keys that all may attend to put in at a place."""
    return torch.cat((mask[..., :place], mask.new_ones(*mask.shape[:-1], count), mask[..., place:]), dim=-1)
