"""Kinds that add a matrix of their own to the weight (LoRA, LoKr, LoHa, full), and DoRA over them.

DoRA (Liu et al. 2024): V = W + D is brought to the trained norms m, per output row or per input column. The rules differ in what a
strength s does: `lycoris` V * (s (m/|V| - 1) + 1), so D stays whole; `interpolated` W + s (V m/|V| - W), as ComfyUI; `peft` scales D
first, V = W + s D. At strength 1 they are one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxsmith.adapters.formats.state import Part
from fluxsmith.adapters.rows import PartModule

RULES = ("lycoris", "interpolated", "peft")


class Additive(PartModule):
    """Override `matrix`, and `product` where there is a cheaper way than the whole matrix."""

    optional = ("bias", "magnitude")
    magnitude: Tensor | None

    def matrix(self) -> Tensor:
        """D at strength 1, (rows, in)."""
        raise NotImplementedError

    def product(self, x: Tensor, strength: Tensor) -> Tensor:
        """strength * D x: (..., in) -> (..., rows)."""
        matrix = self.matrix()
        return F.linear(self.input(x, matrix), matrix) * strength

    def update(self, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        """As PartModule.update."""
        return y + self.product(x, strength).to(y.dtype) if self.magnitude is None else self._decomposed(x, y, strength)

    def delta(self, weight: Tensor, strength: float) -> Tensor:
        """As PartModule.delta."""
        matrix = self.matrix().float().to(weight.device)
        if self.magnitude is None:
            return matrix * strength
        gain = self._gain(weight, matrix, strength).float()
        if self.rule == "lycoris":
            return (weight + matrix) * (strength * (gain - 1) + 1) - weight
        if self.rule == "peft":
            return (weight + matrix * strength) * gain - weight
        return strength * ((weight + matrix) * gain - weight)

    def _gain(self, weight: Tensor, matrix: Tensor, strength: Tensor | float) -> Tensor:
        """m / |V|: (rows, 1) or (1, in). PEFT holds the norm constant in backward."""
        if self.magnitude is None:
            raise ValueError("no magnitude")
        changed = weight + (matrix * strength if self.rule == "peft" else matrix)
        norm = torch.linalg.vector_norm(changed, dim=1 if self.magnitude.shape[1] == 1 else 0, keepdim=True)
        return self.magnitude / (norm.detach() if self.rule == "peft" else norm).clamp_min(torch.finfo(norm.dtype).eps)

    def _decomposed(self, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        gain = self._gain(self.base_rows().detach(), self.matrix(), strength)
        one = torch.ones_like(strength)
        inner = strength if self.rule == "peft" else one
        if gain.shape[1] == 1:
            gain = gain[:, 0].to(y.dtype)
            full = y + self.product(x, inner).to(y.dtype)
            if self.rule == "interpolated":
                return y + ((gain * full - y) * strength).to(y.dtype)
            return full * (gain if self.rule == "peft" else (gain - 1) * strength + 1).to(y.dtype)
        columns = (gain[0] - 1) * (strength if self.rule == "lycoris" else one)  # gain of each input, less 1
        added = self.base_product(x * columns.to(x.dtype)) + self.product(x * (columns + 1).to(x.dtype), inner).to(y.dtype)
        return y + (added * strength if self.rule == "interpolated" else added).to(y.dtype)


def with_magnitude(part: Part, weight: Tensor, per: str, rule: str) -> Part:
    """The part with DoRA's norms of the untouched weight (rows, in): per "output" or "input"."""
    plain = weight.detach().float()
    norm = torch.linalg.vector_norm(plain if plain.is_meta else plain.cpu(), dim=1 if per == "output" else 0, keepdim=True)
    return part.having(tensors={**part.tensors, "magnitude": norm}, rule=rule)
