"""ModelConfig and ControlNetInput: what scripts say about a file and about one condition of a ControlNet.

`ModelConfig(model_id="black-forest-labs/FLUX.1-dev", origin_file_pattern="ae.safetensors").files()` -> the files on this machine.
"""

import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.io.fetch import MODEL_ID, fetch
from fluxsmith.io.safetensors import save_weights

WEIGHTS = (".safetensors", ".sft", ".bin", ".pth", ".pt", ".ckpt", ".gguf")
Device = str | torch.device


@dataclass(eq=False)
class ModelConfig:
    """One model: `path` (a file, its shards, a folder), or a repository and a pattern of names in it.

    The four pairs of device and dtype say where weights wait (offload), where and how they stand by (onload, preparing), and how they
    compute; a pair of offload fields switches the management of memory on for this model.
    """

    path: str | Path | Sequence[str | Path] | None = None
    model_id: str | None = None
    origin_file_pattern: str | Sequence[str] | None = None
    download_source: str | None = None
    local_model_path: str | Path | None = None
    skip_download: bool | None = None
    offload_device: Device | None = None
    offload_dtype: torch.dtype | None = None
    onload_device: Device | None = None
    onload_dtype: torch.dtype | None = None
    preparing_device: Device | None = None
    preparing_dtype: torch.dtype | None = None
    computation_device: Device | None = None
    computation_dtype: torch.dtype | None = None
    clear_parameters: bool = False
    state_dict: Mapping[str, Tensor] | None = None
    quantize: Any = None
    download_resource: str | None = None
    """The older name of `download_source`."""

    written: Path | None = field(default=None, repr=False)
    """The file of a given `state_dict`, as long as this object lives."""

    def __post_init__(self) -> None:
        is_id = isinstance(self.path, str) and MODEL_ID.fullmatch(self.path) and not Path(self.path).exists()
        if is_id and self.model_id is None and self.origin_file_pattern is not None:  # an id in the place of the path
            self.model_id, self.path = str(self.path), None

    def files(self) -> list[Path]:
        """Everything that is meant, sorted by name; what is not on this machine is downloaded, unless that is switched off.

        Raises ConfigError and ModelFileError that say where it was looked for.
        """
        if self.state_dict is not None:
            return [self._written(self.state_dict)]
        if self.path is not None:
            paths = [self.path] if isinstance(self.path, str | Path) else [*self.path]
            return [_there(Path(path).expanduser()) for path in paths]
        if not self.model_id:
            fix = 'write ModelConfig(path="model.safetensors") or ModelConfig(model_id="org/name", origin_file_pattern="*.safetensors")'
            raise ConfigError("this ModelConfig names no model", why="path and model_id are both missing", fix=fix)
        given = self.origin_file_pattern
        patterns = [given] if given is None or isinstance(given, str) else given
        return sorted({path for pattern in patterns for path in self._fetched(self.model_id, pattern)})

    def _written(self, tensors: Mapping[str, Tensor]) -> Path:
        """Weights in memory as a file: all loaders read files, and parts may be read again later."""
        if self.written is None:
            folder = mkdtemp(prefix="fluxsmith-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self.written = Path(folder) / "state_dict.safetensors"
            save_weights(self.written, tensors)
        return self.written

    @property
    def is_here(self) -> bool:
        """Are its files on this machine, so that no hub is asked?"""
        try:
            return bool(replace(self, skip_download=True).files())
        except ModelFileError:
            return False

    def _fetched(self, model_id: str, pattern: str | None) -> list[Path]:
        source = self.download_source or self.download_resource
        root = None if self.local_model_path is None else Path(self.local_model_path).expanduser()
        return fetch(model_id, pattern, source=source, root=root, skip=self.skip_download)  # type: ignore[arg-type]  # checked there

    def weights(self) -> list[Path]:
        """The weights among `files`: configs, tokenizers, and pickles whose safetensors is there too, are left out."""
        inside = [path for file in self.files() for path in (sorted(file.iterdir()) if file.is_dir() else (file,))]
        return [path for path in inside if path.suffix == ".safetensors" or self._is_alone(path, inside)]

    @staticmethod
    def _is_alone(path: Path, others: Sequence[Path]) -> bool:
        return path.suffix in WEIGHTS and path.with_suffix(".safetensors") not in others

    def folder(self) -> Path:
        """The folder of a tokenizer or processor."""
        files = self.files()
        return files[0] if files[0].is_dir() else files[0].parent

    def describe(self) -> str:
        """For messages."""
        if self.path is not None:
            return str(self.path)
        return f"{self.model_id}:{self.origin_file_pattern or '*'}"

    @property
    def is_managed(self) -> bool:
        """Do its fields switch the management of memory on?"""
        return self.offload_device is not None and self.offload_dtype is not None


@dataclass
class ControlNetInput:
    """One condition: which of the loaded ControlNets, how strongly, and from which progress (1 is the first step) to which (0)."""

    controlnet_id: int = 0
    scale: float = 1.0
    start: float = 1.0
    end: float = 0.0
    image: Image.Image | None = None
    inpaint_image: Image.Image | None = None
    inpaint_mask: Image.Image | None = None
    processor_id: str | None = None


def download_customized_models(
    model_id: str, origin_file_path: str, local_dir: str | Path, downloading_priority: Sequence[str] = ()
) -> list[str]:
    """A file of a repository, downloaded to local_dir/model_id if it is not there; its path in a list, as older scripts take it."""
    source: Any = downloading_priority[0] if downloading_priority else None
    return [str(path) for path in fetch(model_id, origin_file_path, source=source, root=Path(local_dir))]


def _there(path: Path) -> Path:
    if not path.exists():
        raise ModelFileError("no such file or folder", where=str(path), fix="check the path")
    return path
