"""Recipes carried out on tensors: one BFL tensor at a time from a file, and foreign tensors from a BFL one.

`assemble(recipe, weights.tensor)` reads and joins; `split_rows(tensor, 3)` is the way back.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fluxsmith.errors import ModelFileError
from fluxsmith.io.header import TensorInfo
from fluxsmith.io.keymaps.recipe import Recipe


def assemble(recipe: Recipe, read: Callable[[str], Tensor]) -> Tensor:
    """The BFL tensor of a recipe; only the tensors it names are read."""
    parts = [read(key) for key in recipe.keys]
    if recipe.op == "concat":
        return torch.cat(parts)
    if recipe.op == "swap_halves":
        return swap_halves(parts[0])
    if recipe.op == "conv1x1" and parts[0].dim() == 2:
        return parts[0][:, :, None, None]
    return parts[0]


def assembled_shape(recipe: Recipe, infos: dict[str, TensorInfo], *, where: str = "") -> tuple[int, ...]:
    """Shape of the assembled tensor without reading it. Raises ModelFileError if a part is missing or does not fit."""
    missing = [key for key in recipe.keys if key not in infos]
    if missing:
        raise ModelFileError(f"tensor {missing[0]} is missing", where=where, fix="get a complete file")
    shapes = [infos[key].shape for key in recipe.keys]
    if recipe.op == "concat":
        if len({shape[1:] for shape in shapes}) > 1:
            raise ModelFileError(f"tensors {', '.join(recipe.keys)} do not fit together: {shapes}", where=where)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return (*shapes[0], 1, 1) if recipe.op == "conv1x1" and len(shapes[0]) == 2 else shapes[0]


def swap_halves(tensor: Tensor) -> Tensor:
    """Second half of the rows first: (shift, scale) <-> (scale, shift)."""
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


def part_rows(rows: int, parts: int, hidden: int) -> list[int]:
    """Rows of each part of a fused layer: q, k, v of `hidden` rows each, and the MLP's rest in a single block."""
    if parts == 4:
        return [hidden, hidden, hidden, rows - 3 * hidden]
    return [rows // parts] * parts


def disassemble(recipe: Recipe, tensor: Tensor, hidden: int) -> dict[str, Tensor]:
    """The stored tensors of a recipe from the BFL one: the inverse of `assemble`. `hidden` is the model's width."""
    if recipe.op == "concat":
        rows: Sequence[int] = part_rows(tensor.shape[0], len(recipe.keys), hidden)
        return dict(zip(recipe.keys, tensor.split(list(rows)), strict=True))
    if recipe.op == "swap_halves":
        return {recipe.keys[0]: swap_halves(tensor)}
    if recipe.op == "conv1x1":
        return {recipe.keys[0]: tensor.flatten(1)}
    return {recipe.keys[0]: tensor}
