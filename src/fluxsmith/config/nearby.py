"""Relative paths of a run file: from the current folder, as everywhere; else, if something is there, from the file's own folder."""

from pathlib import Path
from typing import Any

PATH_KEYS = {
    "model": ("path", "clip_l", "t5xxl", "ae", "tokenizer", "tokenizer_2"),
    "adapter": ("init_from",),
    "data": ("path",),
}


def find_nearby(tree: dict[str, Any], folder: Path) -> None:
    """Change the paths of `tree` (in place) that exist beside the file and not in the current folder."""
    for section, keys in PATH_KEYS.items():
        tables = tree.get(section)
        for table in tables if isinstance(tables, list) else [tables]:
            if isinstance(table, dict):
                table.update({key: _nearby(table[key], folder) for key in keys if key in table})


def _nearby(value: Any, folder: Path) -> Any:
    if not isinstance(value, str) or not value or Path(value).expanduser().is_absolute() or Path(value).exists():
        return value
    return str(folder / value) if (folder / value).exists() else value
