"""Relative paths of a run file: from the current folder, as everywhere; else, if something is there, from the file's own folder."""

from pathlib import Path
from typing import Any

PATH_KEYS = {
    "model": (
        *("path", "clip_l", "t5xxl", "ae", "tokenizer", "tokenizer_2"),
        *("qwen", "qwen_tokenizer", "language_model", "language_tokenizer"),
    ),
    "adapter": ("init_from",),
    "data": ("path",),
}
CONTROL_WORDS = (  # in names of options that are files
    *("path", "image", "mask", "file", "encoder", "decoder", "projector", "qwen", "lora"),
    *("face", "embedding", "annotators"),
)


def find_nearby(tree: dict[str, Any], folder: Path) -> None:
    """Change the paths of `tree` (in place) that exist beside the file and not in the current folder."""
    for section, keys in PATH_KEYS.items():
        tables = tree.get(section)
        for table in tables if isinstance(tables, list) else [tables]:
            if isinstance(table, dict):
                table.update({key: _nearby(table[key], folder) for key in keys if key in table})
    controls = tree.get("control")
    for table in controls if isinstance(controls, list) else ():
        if isinstance(table, dict):
            table.update(_files_nearby(table, folder))


def _files_nearby(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The options of a control that are files, lists of files, or tables with files."""
    changed = {}
    for key, value in table.items():
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            changed[key] = [{**one, **_files_nearby(one, folder)} for one in value]
        elif any(word in key for word in CONTROL_WORDS):
            changed[key] = [_nearby(one, folder) for one in value] if isinstance(value, list) else _nearby(value, folder)
    return changed


def _nearby(value: Any, folder: Path) -> Any:
    if not isinstance(value, str) or not value or Path(value).expanduser().is_absolute() or Path(value).exists():
        return value
    return str(folder / value) if (folder / value).exists() else value
