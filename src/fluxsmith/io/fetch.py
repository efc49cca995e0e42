"""Models by id and pattern, as DiffSynth-Studio users name them: files that are here are taken, others are downloaded once.

`fetch("black-forest-labs/FLUX.1-dev", "text_encoder_2/*.safetensors")` -> the files under ./models/black-forest-labs/FLUX.1-dev.
Kinds of file: weights, numbers and tokenizers; pickles (converted, never opened here), GGUF and ONNX only where the pattern names them.
"""

import hashlib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from fluxsmith.errors import ModelFileError
from fluxsmith.io import hub, modelscope
from fluxsmith.io.durable import Disk, readable_size
from fluxsmith.io.notices import Say, say
from fluxsmith.io.pickles import is_pickle
from fluxsmith.io.shards import SHARD
from fluxsmith.io.sources import download_settings

MODEL_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
WHOLE = (None, "", "./", "*")
UNFINISHED = ".unfinished-"


def fetch(
    model_id: str,
    pattern: str | None = None,
    *,
    source: Literal["modelscope", "huggingface"] | None = None,
    root: Path | None = None,
    skip: bool | None = None,
    note: Say = say,
) -> list[Path]:
    """Local paths of a model's files, sorted; a folder for a pattern that ends in "/" or names everything (None, "", "./").

    `root`: given, else DIFFSYNTH_MODEL_BASE_PATH, else ./models; files lie in root/model_id. `source`: given, else
    DIFFSYNTH_DOWNLOAD_SOURCE, else modelscope. `skip` (else DIFFSYNTH_SKIP_DOWNLOAD): no hub is contacted. Nor is it when what is
    here is complete: every shard is there and no download of this pattern was cut short. Raises ModelFileError that names
    what there is, when nothing matches.
    """
    _check_names(model_id, pattern)
    settings = download_settings(source, root, skip)
    folder = settings.root / model_id
    found = _matches(folder, pattern)
    if settings.skip or (found and _is_complete(folder, pattern, found)):
        if not found:
            raise _nothing(model_id, pattern, str(folder), _names_in(folder), fix="copy the files there, or allow downloads")
        return found
    note(f"downloading {model_id}: {pattern or 'everything'} from {settings.source} to {folder}")
    if settings.source == "huggingface":
        _from_huggingface(model_id, pattern, folder)
    else:
        _from_modelscope(settings.hub, model_id, pattern, folder, note)
    found = _matches(folder, pattern)
    if not found:
        raise _nothing(model_id, pattern, str(folder), _names_in(folder), fix="check the pattern")
    return found


def _check_names(model_id: str, pattern: str | None) -> None:
    if not MODEL_ID.fullmatch(model_id):
        raise ModelFileError(f"{model_id[:100]!r} is no model id", fix="write it as owner/name; for a file that is here give its path")
    if pattern and (pattern.startswith("/") or ".." in pattern.split("/") or "\\" in pattern):
        raise ModelFileError(f"the pattern {pattern[:100]!r} leaves the repository", where=model_id, fix="name files inside it")


def _glob(pattern: str | None) -> str:
    """The pattern of the files that are downloaded."""
    if pattern in WHOLE or pattern is None:
        return "*"
    return f"{pattern}*" if pattern.endswith("/") else pattern


def _matches(folder: Path, pattern: str | None) -> list[Path]:
    if pattern in WHOLE or pattern is None:
        return [folder] if _names_in(folder) else []
    if pattern.endswith("/"):
        place = folder / pattern
        return [place] if _names_in(place) else []
    found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
    return [path for path in found if not (is_pickle(path) and path.with_suffix(".safetensors") in found)]  # it was converted


def _names_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _is_complete(folder: Path, pattern: str | None, found: Sequence[Path]) -> bool:
    if _mark(folder, pattern).exists():
        return False
    files = [path for place in found for path in (place.rglob("*") if place.is_dir() else (place,))]
    for path in files:
        shard = SHARD.fullmatch(path.name)
        if shard and not all(
            path.with_name(f"{shard['stem']}-{number:05d}-of-{shard['count']}{shard['ending']}").is_file()
            for number in range(1, int(shard["count"]) + 1)
        ):
            return False
    return True


def _mark(folder: Path, pattern: str | None) -> Path:
    """A file that is there while the files of a pattern are on their way, so that a cut download is not taken for a whole one."""
    return folder / (UNFINISHED + hashlib.sha256(_glob(pattern).encode()).hexdigest()[:12])


def _wanted(names: Sequence[str], pattern: str | None, model_id: str) -> list[str]:
    """Those of a repository's files that match and are of a kind that is fetched."""
    glob = _glob(pattern)
    matching = sorted(name for name in names if fnmatchcase(name, glob))
    kinds = (*hub.ALLOWED, *(kind for kind in hub.NAMED if glob.endswith(kind)))
    wanted = [name for name in matching if name.endswith(kinds) and _is_inside(name)]
    if not wanted:
        others = f", but {', '.join(matching[:5])} is not a kind of file that is fetched unless its ending is named" if matching else ""
        raise _nothing(model_id, pattern, f"repository {model_id}", names, fix=f"check the pattern{others}")
    return wanted


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return not (name.startswith("/") or "\\" in name or "\0" in name or ":" in name or any(part in ("", ".", "..") for part in parts))


def _nothing(model_id: str, pattern: str | None, where: str, names: Sequence[str], *, fix: str) -> ModelFileError:
    there = f"there is {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "nothing is there"
    return ModelFileError(f"{model_id}: no file matches {pattern or '*'}", where=where, why=there, fix=fix)


def _from_modelscope(server: modelscope.Hub, model_id: str, pattern: str | None, folder: Path, note: Say) -> None:
    files = {file.path: file for file in modelscope.list_files(server, model_id)}
    wanted = _wanted(list(files), pattern, model_id)
    disk, mark = Disk(), _mark(folder, pattern)
    disk.make_folder(folder)
    mark.touch()
    for name in wanted:
        target, file = folder / name, files[name]
        if not target.is_file() or target.stat().st_size != file.size:
            note(f"  {name} ({readable_size(file.size)})")
            modelscope.download(server, model_id, file, target, disk=disk)
    mark.unlink(missing_ok=True)


def _from_huggingface(model_id: str, pattern: str | None, folder: Path) -> None:
    wanted = _wanted(hub.list_files(model_id), pattern, model_id)
    mark = _mark(folder, pattern)
    Disk().make_folder(folder)
    mark.touch()
    hub.download_into(model_id, wanted, folder)
    mark.unlink(missing_ok=True)
