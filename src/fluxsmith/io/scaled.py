"""Files with weights in few bits (ComfyUI's and sd-scripts' "scaled fp8", our own quantised files, GGUF), read as what they stand for.

`with open_scaled("flux1-dev-fp8-scaled.safetensors") as weights: weights.tensor("img_in.weight")` is stored value times scale, fp32.
The tensors beside the weights are not listed, so the file is identified like any other; other files are read as by `open_weights`.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxsmith.io.forms import logical
from fluxsmith.io.gguf_header import QUANTISED
from fluxsmith.io.gguf_values import dequantised
from fluxsmith.io.packed import stood_for
from fluxsmith.io.safetensors import TORCH_DTYPES, WeightsFile, shard_paths


class ScaledFile(WeightsFile):
    """`scaled` names the weights that are stored in fewer bits, and how; they are listed, and read, as fp32."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        super().__init__(paths)
        self.stored = self.infos
        self.infos, self.scaled = logical(self.stored)

    def tensor(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """As WeightsFile.tensor."""
        if name not in self.scaled:
            return super().tensor(name, dtype=dtype, device=device)
        form, parts, shape = self.scaled[name]
        if form in QUANTISED:
            values = dequantised(self._stored(parts[""]), form, shape)
        else:
            values = stood_for(form, self.parts(name, device=device))
        return values.to(device=device, dtype=dtype or torch.float32)

    def parts(self, name: str, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The stored tensors of a weight in few bits: part -> tensor, the values under ""."""
        return {part: self._stored(given).to(device) for part, given in self.scaled[name].parts.items()}

    def _stored(self, name: str) -> Tensor:
        info = self.stored[name]
        if info.dtype in QUANTISED:
            return torch.frombuffer(self._read(name, info), dtype=torch.uint8)
        return torch.frombuffer(self._read(name, info), dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)


def open_scaled(path: str | os.PathLike[str]) -> ScaledFile:
    """As `open_weights`, with weights as what they stand for."""
    return ScaledFile(shard_paths(path))
