"""One branch of guidance: the transformer called with one prompt's states and one set of conditioners, at any noise level."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxsmith.generate.request import Request
from fluxsmith.generate.tiles import in_tiles, windows
from fluxsmith.memory.modulation import Conditioning
from fluxsmith.models.assembly import Level, Models, Predictor, TextStates, model_input, velocity
from fluxsmith.models.stream import Conditioner


@dataclass(frozen=True)
class Branch:
    """A velocity: `branch(x, sigma)`."""

    models: Models
    dit: Predictor
    text: TextStates
    request: Request
    controls: Sequence[Conditioner] = ()

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The prediction noise - clean for latents (1, 16, h, w) at a noise level, fp32."""
        active, level = self.active(sigma), self._level(x, sigma)
        tiling, ae = self.request.windows(), self.models.ae

        def predict(part: Tensor, controls: Sequence[Conditioner]) -> Tensor:
            return velocity(self.dit, part, self.text, level, mask_text=self.models.mask_text, controls=controls).float()

        if tiling is None or ae is None:
            v = predict(x, active)
        else:
            parts = list(windows(x.shape[-2], x.shape[-1], tiling, ae.reduction))
            v = in_tiles(x, parts, active, tiling.overlap // ae.reduction // 2 * 2, predict)
        for control in active:
            v = control.correct(v, x, sigma)
        return v

    def active(self, sigma: float) -> list[Conditioner]:
        """The conditioners that act at a noise level, in their order."""
        found = (control.at(sigma) for control in sorted(self.controls, key=lambda control: control.order))
        return [control for control in found if control is not None]

    def conditionings(self, x: Tensor, levels: Sequence[float]) -> Iterator[Conditioning]:
        """All inputs of the conditioning path that calls with latents like x will have."""
        for sigma in levels:
            tokens = model_input(
                self.dit, x, self.text, self._level(x, sigma), mask_text=self.models.mask_text, controls=self.active(sigma)
            )
            yield Conditioning(tokens.t, tokens.guidance, tokens.y)

    def _level(self, x: Tensor, sigma: float) -> Level:
        t, guidance = (torch.full((x.shape[0],), value, device=x.device) for value in (sigma, float(self.request.guidance or 0.0)))
        return Level(t, guidance)
