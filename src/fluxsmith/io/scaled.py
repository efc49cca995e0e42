"""8-bit weights that are stored with scales (ComfyUI's and sd-scripts' "scaled fp8"), read as what they stand for.

`with open_scaled("flux1-dev-fp8-scaled.safetensors") as weights: weights.tensor("img_in.weight")` is stored value times scale, fp32.
The scale tensors themselves are not listed, so the file is identified like any other; other files are read as by `open_weights`.
"""

import os
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fluxsmith.io.safetensors import TORCH_DTYPES, TensorInfo, WeightsFile, shard_paths

SCALE = re.compile(r"(?P<layer>.+)\.(?:scale_weight|weight_scale)$")
BESIDE = re.compile(r"(?:^|\.)(?:scaled_fp8|scale_input|input_scale|comfy_quant)$")  # how activations are to be quantised
FLOATS = ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32")


class ScaledFile(WeightsFile):
    """`scaled` names the weights that have a scale; they are listed, and read, as fp32."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        super().__init__(paths)
        self.stored = self.infos
        self.scaled = scales_of(self.stored)
        if self.scaled:
            gone = {*self.scaled.values(), *(name for name in self.stored if BESIDE.search(name))}
            self.infos = {
                name: info._replace(dtype="F32") if name in self.scaled else info for name, info in self.stored.items() if name not in gone
            }

    def tensor(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """As WeightsFile.tensor."""
        if name not in self.scaled:
            return super().tensor(name, dtype=dtype, device=device)
        weight, scale = self._stored(name).to(device).float(), self._stored(self.scaled[name]).to(device).float()
        return scaled(weight, scale).to(dtype or torch.float32)

    def _stored(self, name: str) -> Tensor:
        info = self.stored[name]
        return torch.frombuffer(self._read(name, info), dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)


def open_scaled(path: str | os.PathLike[str]) -> ScaledFile:
    """As `open_weights`, with scales applied."""
    return ScaledFile(shard_paths(path))


def scales_of(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Weight -> its scale tensor. Empty if any scale is of a form that is not known here (NVFP4, ...): such files stay refused."""
    found: dict[str, str] = {}
    for name in infos:
        match = SCALE.match(name)
        if match:
            weight = f"{match['layer']}.weight"
            if weight not in infos or not _fits(infos[weight], infos[name]):
                return {}
            found[weight] = name
    return found


def _fits(weight: TensorInfo, scale: TensorInfo) -> bool:
    if weight.dtype not in FLOATS or scale.dtype not in FLOATS or not weight.shape:
        return False
    if scale.elements == 1 or scale.shape in (weight.shape[:1], (weight.shape[0], 1)):
        return True
    is_blocks = len(scale.shape) == 3 and len(weight.shape) == 2 and scale.shape[0] == weight.shape[0] and scale.shape[2] == 1
    return is_blocks and scale.shape[1] > 0 and weight.shape[1] % scale.shape[1] == 0


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` (out, in) times a scale for the tensor, for each row, or for blocks of a row's inputs (out, blocks, 1)."""
    if scale.numel() == 1:
        return weight * scale.flatten()
    if scale.dim() == 3:
        return (weight.view(weight.shape[0], scale.shape[1], -1) * scale).view(weight.shape)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))
