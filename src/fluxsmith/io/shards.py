"""Which files belong to one model: shards, an index, a folder. Headers only, no torch.

`read_model_header("model-00002-of-00003.safetensors").tensors` lists the tensors of all three files.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fluxsmith.errors import ModelFileError
from fluxsmith.io.header import Header, TensorInfo, read_header, refuse_pickle
from fluxsmith.io.pickles import is_pickle, readable

SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.safetensors|\.sft)")
ENDINGS = (".safetensors", ".sft")


def read_model_header(path: str | os.PathLike[str]) -> Header:
    """The headers of all files of a model as one (its path is the first file's). Raises ModelFileError."""
    return join_headers([read_header(part) for part in shard_paths(path)])


def join_headers(headers: Sequence[Header]) -> Header:
    """One table of tensors; offsets stay those of each tensor's own file. Raises ModelFileError for a name in two files."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    owner: dict[str, Header] = {}
    for header in headers:
        for name, info in header.tensors.items():
            if name in tensors:
                what = f"tensor {name} is in {owner[name].path.name} too"
                raise ModelFileError(what, where=str(header.path), fix="download the shards again")
            tensors[name], owner[name] = info, header
        metadata.update(header.metadata)
    return Header(headers[0].path, tensors, metadata, headers[0].data_offset)


def shard_paths(path: str | os.PathLike[str]) -> list[Path]:
    """The files that belong together; a pickle is converted first. Raises ModelFileError that names a missing shard."""
    path = Path(path)
    if path.is_dir():
        return _folder_paths(path)
    if path.name.endswith(".index.json"):
        return _index_paths(path)
    if is_pickle(path):
        return [readable(path)]
    refuse_pickle(path)
    found = SHARD.fullmatch(path.name)
    return _siblings(path, found) if found else [path]


def _siblings(path: Path, found: re.Match[str]) -> list[Path]:
    count = int(found["count"])
    paths = [path.with_name(f"{found['stem']}-{number:05d}-of-{count:05d}{found['ending']}") for number in range(1, count + 1)]
    return _all_there(paths or [path])


def _all_there(paths: list[Path]) -> list[Path]:
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        what = f"{len(missing)} of {len(paths)} shards missing: {', '.join(missing[:5])}"
        raise ModelFileError(what, where=str(paths[0].parent), fix="download the missing files into this folder")
    return paths


def _index_paths(path: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError("index of shards cannot be read", where=str(path), why=str(error)[:200], fix="download it again") from error
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ModelFileError("index of shards names files outside its folder, or none", where=str(path), fix="download it again")
    return _all_there([path.with_name(name) for name in names])


def _folder_paths(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _index_paths(indexes[0])
    files = sorted(path for path in folder.iterdir() if path.suffix in ENDINGS and not path.name.startswith("."))
    if not files:
        for path in sorted(folder.iterdir()):
            refuse_pickle(path)
        raise ModelFileError("no .safetensors file in this folder", where=str(folder), fix="give the file itself")
    found = SHARD.fullmatch(files[0].name)
    paths = _siblings(files[0], found) if found else files[:1]
    if set(files) - set(paths):
        names = ", ".join(path.name for path in files[:5])
        raise ModelFileError(f"several models in this folder: {names}", where=str(folder), fix="give the file itself")
    return paths
