"""Which files a model config means: found, named as what they are, and fingerprinted, before anything is allocated."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ModelFileError
from fluxsmith.io.header import read_header
from fluxsmith.io.shards import shard_paths
from fluxsmith.models.family.flux1 import PRESETS

KEYS = {"dit": "path", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}  # role -> key of the model section
SAMPLES, SAMPLE_BYTES = 16, 65_536  # a fingerprint reads this much of a file beside its header


@dataclass(frozen=True)
class ModelFiles:
    """Paths by role, and tokenizer folders; a role that is not configured is absent."""

    paths: dict[str, Path]
    tokenizers: dict[str, str]

    def path(self, role: str) -> Path:
        """The file of a role; raises ModelFileError that names the key to set."""
        if role not in self.paths:
            raise ModelFileError(f"no file is configured for the {role}", fix=f"set model.{KEYS[role]}")
        return self.paths[role]

    def check(self, roles: Iterable[str]) -> None:
        """Every role's file is there, readable, and what the role needs."""
        for role in roles:
            for path in shard_paths(self.path(role)):
                read_header(path)

    def digests(self, roles: Iterable[str]) -> dict[str, str]:
        """Role -> fingerprint, for the roles that are configured."""
        return {role: fingerprint(self.paths[role]) for role in sorted(roles) if role in self.paths}

    def metadata(self, role: str) -> dict[str, str]:
        """The file's own metadata entries that describe the model's form."""
        metadata = read_header(shard_paths(self.path(role))[0]).metadata
        return {key: value for key, value in metadata.items() if key == "fluxsmith.model"}


def locate(model: PluginConfig) -> ModelFiles:
    """Find the files that a `model` section names."""
    values = model.model_dump()
    paths = {role: Path(values[key]).expanduser() for role, key in KEYS.items() if values.get(key)}
    bundle = PRESETS.get(values.get("preset", ""), {}).get("files")
    if bundle:
        folder = Path(__file__).parent.parent / "bundle" / str(bundle).removeprefix("bundle:")
        for role in KEYS:
            paths.setdefault(role, folder / f"{role}.safetensors")
    tokenizers = {"clip_l": values.get("tokenizer", ""), "t5xxl": values.get("tokenizer_2", "")}
    return ModelFiles(paths, tokenizers)


def fingerprint(path: Path) -> str:
    """A digest that changes when the weights do: header, size, and 16 samples of 64 KiB of every shard (24 GB in milliseconds)."""
    digest = hashlib.sha256()
    for shard in shard_paths(path):
        header = read_header(shard)
        size = shard.stat().st_size
        digest.update(f"{size}:{header.data_offset}".encode())
        with shard.open("rb") as file:
            digest.update(file.read(min(header.data_offset, SAMPLE_BYTES)))
            for place in range(SAMPLES):
                file.seek(header.data_offset + (size - header.data_offset) * place // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]
