"""Where a tokenizer is looked for."""

from pathlib import Path

from fluxsmith.errors import ModelFileError
from fluxsmith.models.files import ModelFiles

FOLDERS = {"clip_l": "tokenizer", "t5xxl": "tokenizer_2"}


def tokenizer_folder(role: str, files: ModelFiles) -> Path:
    """Beside the encoder file, then the configured folder."""
    encoder = files.path(role)
    folder = encoder.parent / FOLDERS[role]
    if folder.is_dir():
        return folder
    if files.tokenizers[role]:
        return Path(files.tokenizers[role])
    raise ModelFileError(f"no tokenizer for {role}", where=str(folder), fix="set it")
