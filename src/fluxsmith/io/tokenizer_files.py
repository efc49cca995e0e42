"""Where the tokenizer of a text encoder is: nothing is fetched, nothing is guessed silently.

`find_tokenizer("t5xxl", Path("models/t5xxl_fp16.safetensors"), "")` -> a folder, or an error that lists every place looked at.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxsmith.errors import ModelFileError
from fluxsmith.io import hub

FOLDERS = {"clip_l": "tokenizer", "t5xxl": "tokenizer_2"}
CLASSES = {"clip_l": "CLIP", "t5xxl": "T5"}
MODEL_TYPES = {"clip_l": "BPE", "t5xxl": "Unigram"}
LOOSE_FILES = {"clip_l": ({"vocab.json", "merges.txt"},), "t5xxl": ({"spiece.model"},)}
CACHED = {  # repository and folder in it
    "clip_l": (
        ("black-forest-labs/FLUX.1-dev", "tokenizer/"),
        ("black-forest-labs/FLUX.1-schnell", "tokenizer/"),
        ("openai/clip-vit-large-patch14", ""),
    ),
    "t5xxl": (
        ("black-forest-labs/FLUX.1-dev", "tokenizer_2/"),
        ("black-forest-labs/FLUX.1-schnell", "tokenizer_2/"),
        ("google/t5-v1_1-xxl", ""),
        ("mcmonkey/google_t5-v1_1-xxl_encoderonly", ""),
    ),
}
NAMES = ("tokenizer.json", "spiece.model", "vocab.json")
KEYS = {"clip_l": "model.tokenizer", "t5xxl": "model.tokenizer_2"}


def find_tokenizer(role: str, encoder_path: Path, configured: str | Path = "") -> Path:
    """The folder of CLIP's (`clip_l`) or T5's (`t5xxl`) tokenizer files.

    A configured folder is used as it is. Else: beside the encoder; `tokenizer` (CLIP) or `tokenizer_2` (T5) next to it or one
    folder up; the hub cache. Raises ModelFileError that lists all of them.
    """
    if configured:
        folder = Path(configured).expanduser()
        if is_tokenizer(folder, role, named=True):
            return folder
        raise ModelFileError(f"{KEYS[role]}: no tokenizer in this folder", where=str(folder), fix=f"it needs one of {', '.join(NAMES)}")
    beside = encoder_path if encoder_path.is_dir() else encoder_path.parent
    if is_tokenizer(beside, role, named=False):
        return beside
    near = [beside / FOLDERS[role], beside.parent / FOLDERS[role]]
    for folder in near:
        if is_tokenizer(folder, role, named=True):
            return folder
    for folder in _cached(role):
        return folder
    looked = [f"beside the encoder ({beside})", *map(str, near), f"{KEYS[role]} (not set)"]
    looked.append("hub cache: " + ", ".join(repo for repo, _ in CACHED[role]))
    repo = CACHED[role][-2 if role == "t5xxl" else -1][0]
    fix = f"copy the tokenizer files of {repo} into {near[0]}, or set {KEYS[role]}"
    raise ModelFileError(f"no tokenizer for {role}", where=str(encoder_path), why="looked: " + "; ".join(looked), fix=fix)


def is_tokenizer(folder: Path, role: str, *, named: bool) -> bool:
    """Does the folder hold a tokenizer of this role? In a `named` folder any tokenizer will do, elsewhere it must be the right kind."""
    if not folder.is_dir():
        return False
    if any(all((folder / name).is_file() for name in names) for names in LOOSE_FILES[role]):
        return True
    if not (folder / "tokenizer.json").is_file():
        return False
    return named or _kind_fits(folder, role)


def _kind_fits(folder: Path, role: str) -> bool:
    name = _json(folder / "tokenizer_config.json").get("tokenizer_class")
    if isinstance(name, str) and any(known in name for known in CLASSES.values()):
        return CLASSES[role] in name
    model = _json(folder / "tokenizer.json").get("model")
    return isinstance(model, dict) and model.get("type") == MODEL_TYPES[role]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _cached(role: str) -> Iterator[Path]:
    for repo, folder in CACHED[role]:
        for name in NAMES:
            found = hub.cached_file(repo, folder + name)
            if found is not None and is_tokenizer(found.parent, role, named=True):
                yield found.parent
