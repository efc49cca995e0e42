"""LoRA-GGPO: in training, each forward adds noise to the weight, as strong per output row as the row's norm and gradient say.

Row r gets sigma * N_r + beta * g_r^2, over sqrt(rows): N_r = sqrt(n0^2 + |scale (up down)_r|^2) with n0 the mean norm of the base's
rows, g_r the norm of the row's gradient |scale (up grad_down + grad_up down)_r| at the last step. Active from the second step on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Perturbation:
    """The noise of one part; `after_backward` and `after_step` keep its strengths up to date."""

    def __init__(self, sigma: float, beta: float, weight: Tensor) -> None:
        """`weight` is the base's, (rows, in)."""
        self.sigma, self.beta = sigma, beta
        self.base_norm = float(torch.linalg.vector_norm(weight.detach().float(), dim=1).mean())
        self.gradient: Tensor | None = None  # (rows,) norms
        self.factor: Tensor | None = None  # (rows,) deviation of the noise

    @torch.no_grad()
    def after_backward(self, down: Tensor, up: Tensor, scale: float) -> None:
        """Take the gradients of the factors, once they are those of the whole batch."""
        if down.grad is None or up.grad is None:
            return
        left = torch.cat((up.float(), up.grad.float()), dim=1)
        right = torch.cat((down.grad.float(), down.float()))
        self.gradient = product_row_norms(left, right) * abs(scale)

    @torch.no_grad()
    def after_step(self, down: Tensor, up: Tensor, scale: float) -> dict[str, float]:
        """New strengths from the stepped factors; returns mean norms for logs."""
        if self.gradient is None:
            return {}
        own = product_row_norms(up.float(), down.float()) * abs(scale)
        combined = (own.square() + self.base_norm**2).sqrt()
        self.factor = (self.sigma * combined + self.beta * self.gradient.square()) / len(combined) ** 0.5
        return {"grad_norm": float(self.gradient.mean()), "combined_norm": float(combined.mean())}

    def noise(self, x: Tensor, dtype: torch.dtype) -> Tensor | float:
        """The noise's share of the output, (..., rows), drawn anew; 0 before the first step. No gradient reaches the factors by it."""
        if self.factor is None:
            return 0.0
        drawn = torch.randn(len(self.factor), x.shape[-1], device=x.device, dtype=dtype)
        return F.linear(x.to(dtype), drawn * self.factor[:, None].to(device=x.device, dtype=dtype))


def product_row_norms(left: Tensor, right: Tensor) -> Tensor:
    """Norms of the rows of left @ right without making it: (rows, r), (r, in) -> (rows,)."""
    return ((left @ (right @ right.T)) * left).sum(dim=1).clamp_min(0).sqrt()
