"""Chroma's transformer: FluxDiT whose conditioning vector is a table of modulations, computed by one small network.

Rows of the table (facts of lodestones' implementation): three for each single block, six for each double block's image side, six for
each text side, two for the last layer. Blocks pick their rows through `TableModulation`; they are FLUX's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError
from fluxsmith.models.flux import FluxDiT, FluxParams, count_blocks
from fluxsmith.models.layers import ModulationOut, RMSNorm, timestep_embedding
from fluxsmith.models.linear import Linear

APPROXIMATOR = "distilled_guidance_layer."
LEVEL_SINUSOIDS, ROW_SINUSOIDS = 16, 32  # widths of the sinusoids of level, guidance (each) and row number


@dataclass(frozen=True)
class ChromaParams(FluxParams):
    """FLUX's numbers and those of the network that computes the modulations."""

    approximator_hidden: int = 5120
    approximator_layers: int = 5

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], axes_dim: Sequence[int] | None = None) -> "ChromaParams":
        """As FluxParams.from_shapes; Chroma has no pooled text."""
        flux = FluxParams.from_shapes({**shapes, "vector_in.in_layer.weight": (0, 0), "guidance_in.in_layer.weight": (0, 0)}, axes_dim)
        try:
            hidden = shapes[APPROXIMATOR + "in_proj.weight"][0]
        except KeyError as missing:
            raise ModelFileError(f"the modulation network is incomplete: {missing} is missing", fix="use a complete Chroma file") from None
        return cls(**asdict(flux), approximator_hidden=hidden, approximator_layers=count_blocks(shapes, APPROXIMATOR + "layers."))


class _Mlp(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.in_layer = Linear(hidden, hidden)
        self.out_layer = Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Approximator(nn.Module):
    """Residual MLPs with RMS norms: sinusoids of level, guidance and row number -> one modulation row."""

    def __init__(self, in_dim: int, out_dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.in_proj = Linear(in_dim, hidden)
        self.layers = nn.ModuleList(_Mlp(hidden) for _ in range(layers))
        self.norms = nn.ModuleList(RMSNorm(hidden) for _ in range(layers))
        self.out_proj = Linear(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, in_dim) -> (B, rows, out_dim)."""
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)


class TableModulation(nn.Module):
    """Takes the place of a block's `Modulation`: its rows of the table, no weights."""

    def __init__(self, first_row: int, *, double: bool) -> None:
        super().__init__()
        self.first_row = first_row
        self.parts = 2 if double else 1

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ...]:
        """vec (B, rows, D) -> shift, scale and gate, (B, 1, D) each, once or twice."""
        rows = vec[:, self.first_row : self.first_row + 3 * self.parts].split(1, dim=1)
        return tuple(ModulationOut(*rows[3 * i : 3 * i + 3]) for i in range(self.parts))


class TableRows(nn.Module):
    """The last layer's shift and scale: two rows of the table, side by side."""

    def __init__(self, first_row: int) -> None:
        super().__init__()
        self.first_row = first_row

    def forward(self, vec: Tensor) -> Tensor:
        """vec (B, rows, D) -> (B, 2 D)."""
        return vec[:, self.first_row : self.first_row + 2].flatten(1)


def table_rows(depth: int, depth_single: int) -> int:
    """Rows of the table: 344 for 19 double and 38 single blocks."""
    return 3 * depth_single + 12 * depth + 2


class Chroma(FluxDiT):
    """FluxDiT with a table of modulations; `y` of Tokens is not used. One padding token after the text stays visible."""

    visible_padding = 1

    def __init__(self, params: ChromaParams) -> None:
        super().__init__(params)
        width = 2 * LEVEL_SINUSOIDS + ROW_SINUSOIDS
        self.distilled_guidance_layer = Approximator(
            width, params.hidden_size, params.approximator_hidden, layers=params.approximator_layers
        )
        image, text = 3 * params.depth_single_blocks, 3 * params.depth_single_blocks + 6 * params.depth
        for i, block in enumerate(self.single_blocks):
            block.modulation = TableModulation(3 * i, double=False)
        for i, block in enumerate(self.double_blocks):
            block.img_mod = TableModulation(image + 6 * i, double=True)
            block.txt_mod = TableModulation(text + 6 * i, double=True)
        self.final_layer.adaLN_modulation = nn.Sequential(TableRows(text + 6 * params.depth))

    def _conditioning_layers(self, params: FluxParams) -> None:
        """None of FLUX's: the table takes their place."""

    def conditioning(self, t: Tensor, guidance: Tensor | None, y: Tensor) -> Tensor:
        """Noise level (B,) and guidance (B,) -> table (B, rows, D), in the type of `y`."""
        guidance = torch.zeros_like(t) if guidance is None else guidance
        rows = table_rows(self.params.depth, self.params.depth_single_blocks)
        level = torch.cat([timestep_embedding(value.float(), LEVEL_SINUSOIDS) for value in (t, guidance)], dim=-1)  # (B, 32)
        numbers = timestep_embedding(torch.arange(rows, device=t.device, dtype=torch.float32), ROW_SINUSOIDS)  # (rows, 32)
        b = t.shape[0]
        inputs = torch.cat((level[:, None].expand(b, rows, -1), numbers[None].expand(b, rows, -1)), dim=-1)
        return self.distilled_guidance_layer(inputs.to(y.dtype))
