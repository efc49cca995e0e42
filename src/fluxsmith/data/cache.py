"""Encoded pictures and captions kept in memory or on disk, under a key that names everything the tensors depend on.

On disk many entries share one safetensors file (a pack), written whole and durably; names of pictures never become names of files.
A pack that does not check out is set aside as `.bad` and its entries are made again.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fluxsmith.data.buckets import Placement
from fluxsmith.data.index import Stamp, stamp_of
from fluxsmith.data.transforms import PixelPlan
from fluxsmith.errors import DataError, FluxsmithError, ModelFileError
from fluxsmith.io.durable import Disk, clean_temporary
from fluxsmith.io.header import TensorInfo, read_header
from fluxsmith.io.safetensors import TORCH_DTYPES, save_weights, tensor_bytes

PACK_BYTES = 64 << 20
PACK_ENTRIES = 256
DIGESTS = "fluxsmith_cache"  # metadata key: entry -> digest of its tensors

Entry = dict[str, Tensor]


def key_of(**parts: Any) -> str:
    """A name for whatever the parts say: equal parts, equal key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:40]


def latents_key(picture: str, plan: PixelPlan, background: tuple[int, int, int], encoder: str) -> str:
    """The key of an encoded picture; `plan.interpolation` must not be "auto" any more. Jittered pictures are not cached."""
    placement = plan.placement
    return key_of(
        kind="latents",
        picture=picture,
        bucket=placement.bucket,
        resized=placement.resized,
        crop=(placement.x, placement.y),
        filter=plan.interpolation,
        flipped=plan.flipped,
        background=background,
        encoder=encoder,
    )


def mask_key(source: str, placement: Placement, *, is_alpha: bool) -> str:
    """The key of a loss mask (not mirrored): the file it comes from, and the crop."""
    crop = (placement.x, placement.y)
    return key_of(kind="mask", source=source, is_alpha=is_alpha, bucket=placement.bucket, resized=placement.resized, crop=crop)


def text_key(caption: str, encoder: str) -> str:
    """The key of an encoded caption."""
    return key_of(kind="text", caption=caption, encoder=encoder)


class Store(Protocol):
    """Keeps entries. `put` may wait with writing until `flush`."""

    def __contains__(self, key: str) -> bool: ...

    def get(self, key: str) -> Entry:
        """The entry; raises KeyError when there is none."""
        ...

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry; its tensors must not change afterwards."""
        ...

    def flush(self) -> None:
        """Everything put so far is safe."""
        ...


class MemoryStore:
    """Entries for the life of the process."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def get(self, key: str) -> Entry:
        """The entry."""
        return self.entries[key]

    def put(self, key: str, entry: Entry) -> None:
        """Keep the entry."""
        self.entries[key] = entry

    def flush(self) -> None:
        """Nothing to do."""


class Stores(NamedTuple):
    """Where encoded pictures (with their masks) and captions are; None is off."""

    latents: Store | None
    text: Store | None


class _Place(NamedTuple):
    """Where an entry lies in its pack."""

    pack: Path
    offset: int
    tensors: dict[str, TensorInfo]


class PackStore:
    """Entries in `folder/<two digits>/<name>.safetensors`.

    Args:
        folder: made when the first pack is written.
        stamps: packs known to be whole, by path; changed packs are read and checked against their digests, and noted here.
        verify: check every pack.
    """

    def __init__(self, folder: Path, *, stamps: dict[str, Stamp], verify: bool = False, disk: Disk | None = None) -> None:
        self.folder = folder
        self.disk = disk or Disk()
        self.stamps = stamps
        self.broken: list[tuple[Path, str]] = []  # (pack as set aside, why)
        self._places: dict[str, _Place] = {}
        self._waiting: dict[str, Entry] = {}
        self._waiting_bytes = 0
        for part in sorted(folder.iterdir()) if folder.is_dir() else ():
            if part.is_dir():
                clean_temporary(part, disk=self.disk)
                for pack in sorted(part.glob("*.safetensors")):
                    self._open(pack, verify=verify)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._waiting

    def get(self, key: str) -> Entry:
        """Read one entry. Safe from several threads."""
        if key in self._waiting:
            return self._waiting[key]
        place = self._places[key]
        try:
            return _read(place)
        except OSError as error:
            raise DataError(
                "cache file cannot be read",
                where=str(place.pack),
                why=str(error),
                fix="start the command again: what is missing is rebuilt",
            ) from error

    def put(self, key: str, entry: Entry) -> None:
        """Collect entries; a pack is written when enough of them wait."""
        entry = {name: tensor.detach().to("cpu").contiguous() for name, tensor in entry.items()}
        self._waiting[key] = entry
        self._waiting_bytes += sum(tensor.nbytes for tensor in entry.values())
        if self._waiting_bytes >= PACK_BYTES or len(self._waiting) >= PACK_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one pack. Raises StorageError."""
        if not self._waiting:
            return
        name = key_of(entries=sorted(self._waiting))
        pack = self.folder / name[:2] / f"{name}.safetensors"
        self.disk.mkdir(pack.parent)
        tensors = {f"{key}/{part}": tensor for key, entry in self._waiting.items() for part, tensor in entry.items()}
        digests = {key: _digest(entry) for key, entry in self._waiting.items()}
        save_weights(pack, tensors, {DIGESTS: json.dumps(digests, sort_keys=True)}, disk=self.disk)
        self.stamps[self._name(pack)] = stamp_of(pack)
        self._open(pack, verify=False)
        self._waiting, self._waiting_bytes = {}, 0

    def _name(self, pack: Path) -> str:
        return pack.relative_to(self.folder.parent).as_posix()

    def _open(self, pack: Path, *, verify: bool) -> None:
        """Learn the pack's entries; set it aside when it is damaged."""
        try:
            places, digests = _table(pack)
            stamp = stamp_of(pack)
            if verify or self.stamps.get(self._name(pack)) != stamp:
                _check(pack, places, digests)
                self.stamps[self._name(pack)] = stamp
        except (ModelFileError, OSError, ValueError) as error:
            self._set_aside(pack, error.problems[0].what if isinstance(error, FluxsmithError) else str(error))
        else:
            self._places |= places

    def _set_aside(self, pack: Path, why: str) -> None:
        bad = pack.with_suffix(".bad")
        self.disk.rename(pack, bad)
        self.stamps.pop(self._name(pack), None)
        self.broken.append((bad, why))


def _table(pack: Path) -> tuple[dict[str, _Place], Mapping[str, str]]:
    """Entries of a pack and the digests it was written with. Raises ModelFileError or ValueError."""
    header = read_header(pack)
    digests = json.loads(header.metadata.get(DIGESTS, "{}"))
    entries: dict[str, dict[str, TensorInfo]] = {}
    for name, info in header.tensors.items():
        key, _, part = name.partition("/")
        entries.setdefault(key, {})[part] = info
    if set(entries) != set(digests):
        raise ValueError("its entries are not those it was written with")
    return {key: _Place(pack, header.data_offset, tensors) for key, tensors in entries.items()}, digests


def _check(pack: Path, places: Mapping[str, _Place], digests: Mapping[str, str]) -> None:
    for key, place in places.items():
        if _digest(_read(place)) != digests[key]:
            raise ValueError("its content changed after it was written")


def _read(place: _Place) -> Entry:
    """All tensors of an entry."""
    fd = os.open(place.pack, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return {part: _tensor(fd, place.offset, info) for part, info in place.tensors.items()}
    finally:
        os.close(fd)


def _tensor(fd: int, offset: int, info: TensorInfo) -> Tensor:
    dtype = TORCH_DTYPES[info.dtype]
    if not info.size:
        return torch.empty(info.shape, dtype=dtype)
    buffer = bytearray(info.size)
    done = 0
    while done < info.size:
        count = os.preadv(fd, [memoryview(buffer)[done:]], offset + info.start + done)
        if not count:
            raise OSError("the file became shorter while it was read")
        done += count
    return torch.frombuffer(buffer, dtype=dtype).reshape(info.shape)


def _digest(entry: Entry) -> str:
    digest = hashlib.sha256()
    for part, tensor in sorted(entry.items()):
        digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:32]
