"""Where and how a model is held for drawing: device, types, kernels, limit of memory, quantised weights, compiled blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from fluxsmith.config.choice import realise
from fluxsmith.config.load import load_quant
from fluxsmith.config.quant import QuantConfig
from fluxsmith.errors import ConfigError
from fluxsmith.io.header import read_header
from fluxsmith.io.shards import shard_paths
from fluxsmith.models.files import ModelFiles
from fluxsmith.models.loading import Loading
from fluxsmith.quant.base import loading, quantise

GIB = 2**30
SPARE = 0.5  # GiB of a card left to others when the limit is found from what is free


class Options(TypedDict, total=False):
    """Keywords of `Pipeline.load`."""

    device: str
    """auto, cpu, cuda."""
    dtype: torch.dtype | None
    """Of the transformer: fp32 on the CPU and bf16 on a card by default."""
    attention: str
    """A kernel of `models/backends.py`; auto takes the best that is there."""
    vram_limit: float | Literal["auto"] | None
    """GiB of the device: parts are there only while they work, and layers beyond it are streamed; 0 streams all of them. None: everything
    stays there. auto: what is free, if the model is larger."""
    offload_dir: Path | None
    """Folder where layers that wait under a limit are memory-mapped files, instead of host memory."""
    quant: QuantConfig | Mapping[str, Any] | None
    """A `quant` section: weights of fewer bits."""
    compile: bool
    """Compile each block."""


@dataclass(frozen=True)
class Place:
    """The options, decided."""

    device: torch.device
    dtype: torch.dtype
    attention: str = "auto"
    limit: float | None = None
    folder: Path | None = None
    quant: Any = None
    compile: bool = False

    @property
    def loads_to(self) -> torch.device:
        """Where files are read to: under a limit the host, from where parts come when they work."""
        return self.device if self.limit is None else torch.device("cpu")

    def loading(self) -> Loading:
        """How `LazyModels` reads the parts; blocks are quantised as soon as they are read."""
        return loading(self.quant, self.dtype, self.device)

    def finish(self, role: str, module: nn.Module) -> None:
        """What is left to do with a part that was loaded: layers outside the blocks."""
        if self.quant is not None:
            quantise(self.quant, role, module)


def place_of(options: Options, files: ModelFiles, roles: tuple[str, ...]) -> Place:
    """Decide. Raises ConfigError for a device or a kind of weights that there is not; only headers are read."""
    device = options.get("device", "auto")
    at = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device)
    if at.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device", fix="use --device cpu, or install torch for your card and its driver")
    given = options.get("quant")
    quant = None if given is None else realise(given if isinstance(given, QuantConfig) else load_quant(given))
    if quant is not None:
        quant.require(at)
    dtype = options.get("dtype") or (torch.float32 if at.type == "cpu" else torch.bfloat16)
    limit = options.get("vram_limit")
    if limit == "auto":
        limit = limit_for(free_memory(at), sum(size_of(files, role) for role in roles))
    folder = options.get("offload_dir")
    if folder is not None and limit is None:
        raise ConfigError("offload_dir has no effect", why="nothing waits without a limit", fix="give vram_limit too, or leave it out")
    return Place(at, dtype, options.get("attention", "auto"), limit, folder, quant, options.get("compile", False))


def limit_for(free: int | None, needed: int) -> float | None:
    """GiB to keep within: none where all of the files fit at once, else what is free but for a spare half."""
    return None if free is None or needed + 2 * GIB <= free else max(0.0, free / GIB - SPARE)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a card now; None where there is no card."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def size_of(files: ModelFiles, role: str) -> int:
    """Bytes of a role's tensors, from the headers."""
    return sum(info.size for shard in shard_paths(files.path(role)) for info in read_header(shard).tensors.values())
