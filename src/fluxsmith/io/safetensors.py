"""Tensors on disk: checked header, one tensor read at a time, streamed and durable writing.

`with open_weights("flux1-dev.safetensors") as weights: w = weights.tensor("img_in.weight", dtype=torch.bfloat16)`
Only the bytes of the tensor that is asked for are read; nothing is mapped.
"""

import json
import mmap
import os
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fluxsmith.errors import ModelFileError
from fluxsmith.io.durable import Disk, FileRecord
from fluxsmith.io.header import DTYPE_BITS, Header, TensorInfo, read_header
from fluxsmith.io.shards import join_headers, shard_paths

__all__ = ["Header", "Lazy", "TensorInfo", "WeightsFile", "open_weights", "read_header", "save_weights", "shard_paths"]

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
STORED_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
LAYOUT_ORDER: Mapping[str, int] = {name: place for place, name in enumerate(DTYPE_BITS)}
OWN_PAGES = 1 << 20  # bytes from which a buffer is mapped instead of taken from the heap
READ_BYTES = 1 << 30  # the kernel reads at most 2 GiB at a time


class Lazy(NamedTuple):
    """A tensor to be written that is made only when its turn comes, so that a converted model never is in memory whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


class WeightsFile:
    """One safetensors file or a set of shards, as one table of tensors. Close it, or use it in a `with`."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self.headers = tuple(read_header(path) for path in paths)
        self.paths = tuple(header.path for header in self.headers)
        joined = join_headers(self.headers)
        self.infos: dict[str, TensorInfo] = joined.tensors
        self.metadata: dict[str, str] = joined.metadata
        self._shard_of = {name: place for place, header in enumerate(self.headers) for name in header.tensors}
        self._fds: dict[int, int] = {}

    def keys(self) -> KeysView[str]:
        """Names of all tensors."""
        return self.infos.keys()

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def tensor(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor (as stored, or cast to `dtype` and moved). Raises ModelFileError for an unknown name or a short file."""
        if name not in self.infos:
            raise ModelFileError(f"it has no tensor {name}", where=str(self.paths[0]))
        info = self.infos[name]
        if info.dtype not in TORCH_DTYPES:
            raise ModelFileError(f"tensor {name} is {info.dtype}, which is not supported", where=self._path_of(name))
        stored = TORCH_DTYPES[info.dtype]
        if not info.size:
            tensor = torch.empty(info.shape, dtype=stored)
        else:
            tensor = torch.frombuffer(self._read(name, info), dtype=stored).reshape(info.shape)
        return tensor.to(device=device, dtype=dtype or stored)

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor."""
        return TORCH_DTYPES[self.infos[name].dtype]

    def _path_of(self, name: str) -> str:
        return str(self.paths[self._shard_of[name]])

    def _read(self, name: str, info: TensorInfo) -> bytearray | mmap.mmap:
        shard = self._shard_of[name]
        if shard not in self._fds:
            self._fds[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        buffer = _buffer(info.size)
        view, place = memoryview(buffer), self.headers[shard].data_offset + info.start
        while view:
            count = os.preadv(self._fds[shard], [view[:READ_BYTES]], place)
            if not count:
                raise ModelFileError("file became shorter while it was read", where=self._path_of(name), fix="copy the file again")
            view, place = view[count:], place + count
        return buffer

    def close(self) -> None:
        """Give the file handles back; a later `tensor` opens them again."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if "_fds" in self.__dict__:  # __init__ may have raised
            self.close()


def _buffer(size: int) -> bytearray | mmap.mmap:
    """Memory for one tensor. Large ones get pages of their own, which go back at once when a cast makes them superfluous
    (from the heap, loading a 16-bit file in another type leaves holes of an eighth of the model)."""
    return bytearray(size) if size < OWN_PAGES else mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def open_weights(path: str | os.PathLike[str]) -> WeightsFile:
    """Open a file, a shard (with its siblings), an `*.index.json`, or a folder that holds one file or one set of shards."""
    return WeightsFile(shard_paths(path))


def save_weights(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | Lazy],
    metadata: Mapping[str, str] | None = None,
    *,
    disk: Disk | None = None,
) -> FileRecord:
    """Write one safetensors file durably (see `Disk.write_file`), tensor by tensor; returns size and SHA-256.

    Byte order and layout equal the safetensors library's (largest alignment first, then by name); metadata is sorted, so equal
    content gives equal bytes. Raises StorageError, and ModelFileError for a type that the format does not know.
    """
    names = layout_order(tensors)
    head = header_bytes({name: tensors[name] for name in names}, metadata or {})
    size = len(head) + sum(_size(tensors[name]) for name in names)
    return (disk or Disk()).write_file(Path(path), _stream(head, names, tensors), size=size)


def layout_order(tensors: Mapping[str, Tensor | Lazy]) -> list[str]:
    """Names in the order of their bytes in the file. Raises ModelFileError for a type that the format does not know."""
    return sorted(tensors, key=lambda name: (-LAYOUT_ORDER[_stored_name(name, tensors[name])], name))


def header_bytes(tensors: Mapping[str, Tensor | Lazy], metadata: Mapping[str, str]) -> bytes:
    """Length, JSON and padding for tensors laid out in the given order."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    place = 0
    for name, tensor in tensors.items():
        end = place + _size(tensor)
        entries[name] = {"dtype": _stored_name(name, tensor), "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stored_name(name: str, tensor: Tensor | Lazy) -> str:
    if tensor.dtype not in STORED_NAMES:
        raise ModelFileError(f"tensor {name} has type {tensor.dtype}, which safetensors files cannot hold")
    return STORED_NAMES[tensor.dtype]


def _size(tensor: Tensor | Lazy) -> int:
    count = tensor.dtype.itemsize
    for side in tensor.shape:
        count *= side
    return count


def _stream(head: bytes, names: Sequence[str], tensors: Mapping[str, Tensor | Lazy]) -> Iterator[bytes | memoryview]:
    yield head
    for name in names:
        yield tensor_bytes(_made(name, tensors[name]))


def _made(name: str, tensor: Tensor | Lazy) -> Tensor:
    if isinstance(tensor, Tensor):
        return tensor
    made = tensor.make()
    if made.dtype != tensor.dtype or tuple(made.shape) != tuple(tensor.shape):
        raise ModelFileError(f"{name} was announced as {tensor.dtype} {tensor.shape} and made as {made.dtype} {tuple(made.shape)}")
    return made


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes, row by row; no copy when it is contiguous and on the host."""
    flat = tensor.detach().to("cpu").contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # a single value cut out of a tensor may have any stride
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
