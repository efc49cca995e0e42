"""Which files a model config means: found, named as what they are, and fingerprinted, before anything is allocated."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fluxsmith.config.choice import realise
from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import FluxsmithError, ModelFileError, Problem
from fluxsmith.io.header import read_header
from fluxsmith.io.identify import identify, require_role
from fluxsmith.io.shards import shard_paths
from fluxsmith.io.sources import find_tokenizer, resolve

KEYS = {"dit": "path", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}  # role -> key of the model section
SAMPLES, SAMPLE_BYTES = 16, 65_536  # a fingerprint reads this much of a file beside its header
FORM = "fluxsmith.model"  # metadata entry that describes a model's form


@dataclass(frozen=True)
class ModelFiles:
    """What the config says about each role; files are looked for when they are first asked for."""

    given: dict[str, str]
    tokenizers: dict[str, str]
    found: dict[str, Path] = field(default_factory=dict)

    def path(self, role: str) -> Path:
        """The file of a role. Raises ModelFileError that names the key to set, or where it was looked for."""
        if role not in self.found:
            self.found[role] = self._find(role)
        return self.found[role]

    def _find(self, role: str) -> Path:
        if self.given[role]:
            return resolve(self.given[role], role)
        whole = self.given["dit"]
        if whole and role != "dit":  # a folder, a hub id or an all-in-one file may hold the other parts too
            path = resolve(whole, "dit")
            if path.is_file() and role in identify(path).roles():
                return path
            if not Path(whole).expanduser().is_file():
                return resolve(whole, role)
        raise ModelFileError(f"no file is configured for the {role}", fix=f"set model.{KEYS[role]}")

    def check(self, roles: Iterable[str]) -> None:
        """Every role's file is there, readable, and what the role needs; all findings in one ModelFileError."""
        problems: list[Problem] = []
        for role in roles:
            try:
                require_role(self.path(role), role)
            except FluxsmithError as error:
                problems += error.problems
        if problems:
            raise ModelFileError(str(problems[0]), problems=tuple(problems))

    def tokenizer(self, role: str) -> Path:
        """The folder of an encoder's tokenizer."""
        return find_tokenizer(role, self.path(role), self.tokenizers[role])

    def digests(self, roles: Iterable[str]) -> dict[str, str]:
        """Role -> fingerprint."""
        return {role: fingerprint(self.path(role)) for role in sorted(roles)}

    def metadata(self, role: str) -> dict[str, str]:
        """The file's own metadata entries that describe the model's form."""
        metadata = read_header(shard_paths(self.path(role))[0]).metadata
        return {key: value for key, value in metadata.items() if key == FORM}


def locate(model: PluginConfig) -> ModelFiles:
    """The files that a `model` section names; the bundled model's where its preset says so."""
    values = model.model_dump()
    bundle = realise(model).facts().bundle
    given = {role: str(values.get(key) or bundle) for role, key in KEYS.items()}
    return ModelFiles(given, {"clip_l": values.get("tokenizer", ""), "t5xxl": values.get("tokenizer_2", "")})


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
