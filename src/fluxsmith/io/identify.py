"""Which model or adapter a file is, from its key names and shapes alone: no hash table, no torch, no tensor is read.

`identify("flux1-dev.safetensors")` -> family "flux1", role "dit", variant "dev"; `require_role(path, "clip_l")` refuses others.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fluxsmith.errors import ModelFileError
from fluxsmith.io.forms import Stored, logical
from fluxsmith.io.header import Header, TensorInfo
from fluxsmith.io.identify_dit import identify_dit
from fluxsmith.io.identify_parts import identify_parts, is_adapter, other_model
from fluxsmith.io.identity import ROLE_NAMES, Identity, Infos, evidence
from fluxsmith.io.keymaps import comfy
from fluxsmith.io.shards import read_model_header

__all__ = ["Identity", "identify", "require_role"]

PLAYS = {"ae": ("ae", "tiny_ae")}  # role asked for -> roles that serve


@runtime_checkable
class HasInfos(Protocol):
    """An open weights file."""

    infos: dict[str, TensorInfo]
    paths: tuple[Path, ...]


def identify(source: str | os.PathLike[str] | Header | HasInfos) -> Identity:
    """What a file (shards, folder, header, open file) is. Unknown files get role "unknown". Raises ModelFileError if unreadable."""
    if isinstance(source, Header):
        infos, path = source.tensors, source.path
    elif isinstance(source, HasInfos):
        infos, path = source.infos, source.paths[0]
    else:
        infos, path = read_model_header(source).tensors, Path(source)
    plain, stored = logical(infos)
    found = _bundle(plain) or _one_model(plain)
    sizes = found.sizes | _totals(infos) | {"parameters": sum(info.elements for info in plain.values())}
    return replace(found, path=path, sizes=sizes, notes=(*found.notes, *_forms(stored)))


def _forms(stored: Mapping[str, Stored]) -> tuple[str, ...]:
    counts = Counter("8 bits with scales" if one.form == "scaled" else one.form for one in stored.values())
    return tuple(f"{count} weights are stored in {form}" for form, count in sorted(counts.items()))


def require_role(path: str | os.PathLike[str], role: str) -> Identity:
    """The identity of a file that can play `role` (alone, or inside an all-in-one checkpoint).

    Raises ModelFileError that says what the file is instead, or what is missing from it, before anything is allocated.
    """
    return check_role(identify(path), role, where=os.fspath(path))


def check_role(found: Identity, role: str, *, where: str) -> Identity:
    """As `require_role`, of what was identified already; `where` names the file."""
    where = f"{role} = {where}"
    if not any(served in (*found.roles(), *found.parts()) for served in PLAYS.get(role, (role,))):
        expected = ROLE_NAMES.get(role, role)
        seen = evidence(role)
        wanted = f"{expected} was expected" + (f" ({seen})" if seen else "")
        raise ModelFileError(f"this is {found.describe()}, {wanted}", where=where, fix=f"give the right file for {role}")
    if found.unusable:
        raise ModelFileError(f"this is {found.describe()}, but {'; '.join(found.unusable)}", where=where, fix="get a complete file")
    return found


def _one_model(infos: Infos) -> Identity:
    parts = identify_parts(infos)
    if parts is not None and parts.role != "dit":
        return parts
    return identify_dit(infos) or parts or other_model(infos)


def _bundle(infos: Infos) -> Identity | None:
    """Several models under prefixes in one file."""
    parts = comfy.split(infos)
    encoders = [role for role in ("clip_l", "t5xxl") if role in parts]
    if (len(parts) < 2 and not encoders) or is_adapter(infos):
        return None
    inner = {role: _one_model({name: infos[prefix + name] for name in names}) for role, (prefix, names) in parts.items()}
    if "dit" in inner and inner["dit"].role != "dit":
        return inner["dit"]
    problems, unusable = [], []
    for role, identity in inner.items():
        if identity.role != role:
            unusable.append(f"under {parts[role][0]} is {identity.describe()}")
        problems += [f"{role}: {text}" for text in identity.problems]
        unusable += [f"{role}: {text}" for text in identity.unusable]
    dit = inner.get("dit")
    sizes: dict[str, Any] = dict(dit.sizes) if dit else {}
    sizes["roles"] = {role: prefix for role, (prefix, _) in parts.items()}
    sizes.pop("parts", None)
    only_encoders = set(parts) <= {"clip_l", "t5xxl"}
    return Identity(
        family=dit.family if dit else "flux1",
        role="text_encoders_bundle" if only_encoders else "checkpoint",
        variant=dit.variant if dit else "",
        key_style=dit.key_style if dit else "comfy",
        problems=tuple(dict.fromkeys([*unusable, *problems])),
        notes=dit.notes if dit else (),
        sizes=sizes,
        unusable=tuple(unusable),
    )


def _totals(infos: Infos) -> dict[str, Any]:
    dtypes = Counter(info.dtype for info in infos.values())
    return {
        "tensors": len(infos),
        "parameters": sum(info.elements for info in infos.values()),
        "bytes": sum(info.size for info in infos.values()),
        "dtypes": dict(sorted(dtypes.items())),
    }
