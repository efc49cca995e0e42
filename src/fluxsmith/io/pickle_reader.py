"""Run in a process of its own (`python -I pickle_reader.py IN OUT METADATA`): a torch pickle's tensors, written as safetensors.

Nothing of the file is executed: the unpickler knows the names by which torch describes tensors, each stands for an inert
description, and every other name ends the reading. Only the standard library is used. fluxsmith/io/pickles.py starts it.
"""

import io
import json
import pickle
import resource
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

MAX_PICKLE = 64 << 20  # bytes of the description; 20,000 tensors need about 4 MB
MAX_ENTRIES = 100_000
MAX_TENSORS = 20_000
MAX_DEPTH = 8
MAX_SIDES = 16
MAX_NAME = 512
GROWTH = 4  # tensors may share storage, the written file has it for each of them
MEMORY = 1 << 30  # address space beside twice the file's size
SECONDS, BYTES_PER_SECOND = 600, 20 << 20
CHUNK = 16 << 20
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
LETTERS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
WRAPPERS = ("state_dict", "module", "model_state", "model")


class Refused(Exception):
    """The file holds something that is not read."""


class Dtype(NamedTuple):
    """A type of numbers; "" is raw bytes, whose type the tensor names."""

    name: str


class Storage(NamedTuple):
    """One run of numbers in the archive."""

    dtype: str
    key: str
    elements: int


class View(NamedTuple):
    """A tensor: a window on a storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        count = 1
        for side in self.shape:
            count *= side
        return count


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > MAX_SIDES or not all(type(v) is int and 0 <= v < 1 << 48 for v in values):
        raise Refused("a tensor's shape is not a row of numbers")
    return values


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> View:
    """torch._utils._rebuild_tensor_v2, and _v3 with its dtype after two more values."""
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise Refused("a tensor without a storage")
    dtype = next((other.name for other in others if isinstance(other, Dtype)), storage.dtype)
    shape, strides = _counts(shape), _counts(strides)
    if not dtype or len(shape) != len(strides):
        raise Refused("a tensor that does not say what it is")
    view = View(storage, dtype, offset, shape, strides)
    held = storage.elements * (WIDTHS[storage.dtype] if storage.dtype else 1) // WIDTHS[dtype]  # raw storages count bytes
    if view.elements and offset + _reach(view) > held:
        raise Refused("a tensor that reaches beyond its storage")
    return view


def _parameter(tensor: Any, *_: Any) -> View:
    """torch._utils._rebuild_parameter."""
    if not isinstance(tensor, View):
        raise Refused("a parameter without a tensor")
    return tensor


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "UntypedStorage"): Dtype(""),
    **{("torch", name): Dtype(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): Dtype(dtype) for name, dtype in DTYPES.items()},
}


class Reader(pickle.Unpickler):
    """Knows the names above and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for a name of torch's."""
        if (module, name) not in KNOWN:
            raise Refused(f"it asks for {module[:80]}.{name[:80]}, which is no part of a tensor")
        return KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """A storage by its place in the archive."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], Dtype):
            raise Refused("a reference to something that is no storage")
        if not isinstance(pid[2], str) or not pid[2].isalnum() or type(pid[4]) is not int or pid[4] < 0:
            raise Refused("a storage without a place")
        return Storage(pid[1].name, pid[2], pid[4])


class Archive:
    """The zip file that torch writes: one folder with data.pkl and data/0, data/1, ..., nothing compressed."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            start = file.read(4)
        if start != b"PK\x03\x04":
            legacy = start.startswith(b"\x80") and start[1:2] in b"\x02\x03\x04\x05"
            raise Refused("it is a pickle of torch before 1.6" if legacy else "it is no torch archive")
        self.zip = zipfile.ZipFile(path)
        entries = self.zip.infolist()
        names = [entry.filename for entry in entries]
        if len(entries) > MAX_ENTRIES or len(set(names)) != len(names):
            raise Refused("its table of contents is not torch's")
        packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1), None)
        if packed is not None:
            raise Refused(f"{packed[:80]} is compressed or locked, which torch never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise Refused("its table of contents promises more bytes than the file has")
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused("it has no data.pkl")
        self.root = pickles[0].removesuffix("data.pkl")
        if f"{self.root}byteorder" in names and self.zip.read(f"{self.root}byteorder") != b"little":
            raise Refused("its numbers are stored the other way round")

    def description(self) -> Any:
        """What data.pkl says, as dicts of views."""
        entry = self.zip.getinfo(f"{self.root}data.pkl")
        if entry.file_size > MAX_PICKLE:
            raise Refused(f"its description has {entry.file_size} bytes, at most {MAX_PICKLE} are read")
        return Reader(io.BytesIO(self.zip.read(entry))).load()

    def size(self, storage: Storage) -> int:
        """Stored bytes."""
        return self.zip.getinfo(f"{self.root}data/{storage.key}").file_size

    def data(self, view: View) -> Iterator[bytes]:
        """A tensor's values, row by row; checked against the archive's own sums where they are read whole."""
        width, whole = WIDTHS[view.dtype], self.size(view.storage)
        with self.zip.open(f"{self.root}data/{view.storage.key}") as stored:
            if view.offset == 0 and _is_contiguous(view) and view.elements * width == whole:
                while chunk := stored.read(CHUNK):
                    yield chunk
                return
            if whole % width or view.elements and (view.offset + _reach(view)) * width > whole:
                raise Refused("a storage that is shorter than its tensors")
            numbers = memoryview(stored.read()).cast(LETTERS[width])
        yield from _rows(numbers, view.offset, view.shape, view.strides)


def _is_contiguous(view: View) -> bool:
    expected = 1
    for side, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if side > 1 and stride != expected:
            return False
        expected *= side
    return True


def _reach(view: View) -> int:
    """One more than the distance of the last value from the first."""
    return 1 + sum((side - 1) * stride for side, stride in zip(view.shape, view.strides, strict=True))


def _rows(numbers: memoryview, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Iterator[bytes]:
    if 0 in shape:
        return
    if not shape:
        yield numbers[offset : offset + 1].tobytes()
    elif len(shape) == 1 and strides[0]:
        yield numbers[offset : offset + (shape[0] - 1) * strides[0] + 1 : strides[0]].tobytes()
    elif len(shape) == 1:
        yield numbers[offset : offset + 1].tobytes() * shape[0]
    else:
        for index in range(shape[0]):
            yield from _rows(numbers, offset + index * strides[0], shape[1:], strides[1:])


def flat(tree: Any) -> tuple[dict[str, View], int]:
    """Nested dicts with dots between the names, without a wrapper around everything; and how many entries were no tensors."""
    while isinstance(tree, dict) and len(wrapped := [key for key in WRAPPERS if isinstance(tree.get(key), dict)]) == 1:
        if any(isinstance(value, View) for value in tree.values()):
            break
        tree = tree[wrapped[0]]
    found: dict[str, View] = {}
    left = _collect(tree, "", found, 0)
    if not found:
        raise Refused("it holds no tensors by name")
    return found, left


def _collect(tree: Any, start: str, found: dict[str, View], depth: int) -> int:
    if isinstance(tree, View):
        name = start.removesuffix(".")
        if not name or len(name) > MAX_NAME or name in found or len(found) == MAX_TENSORS:
            raise Refused("names of its tensors are missing, too long, too many, or there twice")
        found[name] = tree
        return 0
    if not isinstance(tree, dict) or depth == MAX_DEPTH:
        return 1
    return sum(_collect(value, f"{start}{key}.", found, depth + 1) for key, value in tree.items() if isinstance(key, str | int))


def write(archive: Archive, views: Mapping[str, View], metadata: Mapping[str, str], out: IO[bytes]) -> int:
    """The tensors as safetensors; returns bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name in (ordered := sorted(views, key=lambda name: (-WIDTHS[views[name].dtype], name))):
        end = place + views[name].elements * WIDTHS[views[name].dtype]
        entries[name] = {"dtype": views[name].dtype, "shape": list(views[name].shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        written = sum(out.write(data) for data in archive.data(views[name]))
        if written != views[name].elements * WIDTHS[views[name].dtype]:
            raise Refused(f"{name[:80]} has another size than it says")
    return place


def restrict(size: int) -> None:
    """This process may take memory, time and disk in proportion to the file, and may start no other."""
    limits = {
        resource.RLIMIT_AS: MEMORY + 2 * size,
        resource.RLIMIT_CPU: SECONDS + size // BYTES_PER_SECOND,
        resource.RLIMIT_FSIZE: GROWTH * size + MAX_PICKLE,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def convert(source: Path, target: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    """IN to OUT. Raises Refused, and what the standard library raises for broken archives and pickles."""
    archive = Archive(source)
    views, left = flat(archive.description())
    wanted = sum(view.elements * WIDTHS[view.dtype] for view in views.values())
    if wanted > GROWTH * source.stat().st_size:
        raise Refused(f"its tensors share so much that they would need {wanted} bytes")
    with target.open("wb") as out:
        size = write(archive, views, metadata, out)
    return {"tensors": len(views), "bytes": size, "left": left}


def main(words: list[str], say: Callable[[str], Any]) -> int:
    """Says one JSON object: what was done, or why not."""
    source, target = Path(words[0]), Path(words[1])
    try:
        restrict(source.stat().st_size)
        say(json.dumps(convert(source, target, json.loads(words[2]))))
    except MemoryError:
        say(json.dumps({"refused": "it needs more memory than its size explains"}))
        return 1
    except Exception as error:  # noqa: BLE001  whatever a hostile file provokes ends in a refusal
        say(json.dumps({"refused": str(error)[:300] if isinstance(error, Refused) else f"it is damaged ({type(error).__name__})"}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdout.write))
