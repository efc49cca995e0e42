"""Where a model file is: a path, a folder (diffusers or ComfyUI layout), a hub id, or the bundled model. Environment:
FLUXSMITH_HOME (io/home.py), and those of DiffSynth-Studio and ModelScope below; huggingface_hub reads its own HF_*.

`resolve("black-forest-labs/FLUX.1-dev", "ae")`, `resolve("ComfyUI/models", "t5xxl")`, `resolve("bundle:flux-shapes", "dit")`.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fluxsmith.errors import FluxsmithError, ModelFileError
from fluxsmith.io import hub, modelscope
from fluxsmith.io.home import home
from fluxsmith.io.identify import PLAYS, identify
from fluxsmith.io.shards import ENDINGS, SHARD
from fluxsmith.io.tokenizer_files import find_tokenizer

__all__ = ["download_settings", "find_role", "find_tokenizer", "home", "resolve"]

BUNDLE = "bundle:"
BUNDLE_FOLDER = Path(__file__).resolve().parent.parent / "bundle"
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+)(?::(?P<file>[A-Za-z0-9._/-]+))?")
DIFFUSERS_FOLDERS = {"dit": ("transformer",), "clip_l": ("text_encoder",), "t5xxl": ("text_encoder_2",), "ae": ("vae",)}
COMFY_FOLDERS = {
    "dit": ("diffusion_models", "unet", "checkpoints"),
    "clip_l": ("text_encoders", "clip", "checkpoints"),
    "t5xxl": ("text_encoders", "clip", "checkpoints"),
    "ae": ("vae", "vae_approx", "checkpoints"),
    "lora": ("loras",),
    "controlnet": ("controlnet",),
}
MAX_CANDIDATES = 200  # headers read in one folder


class DownloadSettings(NamedTuple):
    """Where models given by an id are looked for, and where they come from."""

    source: str
    root: Path
    skip: bool
    hub: modelscope.Hub


def download_settings(source: str | None, root: Path | None, skip: bool | None) -> DownloadSettings:
    """What was given, else the environment (DIFFSYNTH_DOWNLOAD_SOURCE, _MODEL_BASE_PATH, _SKIP_DOWNLOAD; MODELSCOPE_ENDPOINT,
    _DOMAIN, _API_TOKEN), else ModelScope and ./models. Raises ModelFileError for an unknown source or switch."""
    named = "DIFFSYNTH_DOWNLOAD_SOURCE" if source is None else "download_source"
    chosen = (source or os.environ.get("DIFFSYNTH_DOWNLOAD_SOURCE") or "modelscope").lower()
    if chosen not in ("modelscope", "huggingface"):
        raise ModelFileError(f"{named} = {chosen}: no such hub", fix="write modelscope or huggingface")
    if skip is None:
        switch = (os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD") or "false").lower()
        if switch not in ("true", "false", "1", "0"):
            raise ModelFileError(f"DIFFSYNTH_SKIP_DOWNLOAD = {switch}: neither yes nor no", fix="write true or false")
        skip = switch in ("true", "1")
    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    endpoint = (os.environ.get("MODELSCOPE_ENDPOINT") or domain).rstrip("/")
    server = modelscope.Hub(endpoint if "://" in endpoint else f"https://{endpoint}", os.environ.get("MODELSCOPE_API_TOKEN", ""))
    return DownloadSettings(chosen, root or Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "models"), skip, server)


def resolve(given: str | os.PathLike[str], role: str, *, base: Path | None = None) -> Path:
    """The file or folder that holds `role` (dit, clip_l, t5xxl, ae, lora, ...), ready for `open_weights`.

    A relative path is looked for from the current folder, from `base` (the folder of the config file) and in
    `FLUXSMITH_HOME/models`. Raises ModelFileError that lists where it was looked for.
    """
    text = os.fspath(given)
    if not text:
        raise ModelFileError(f"no file is given for {role}", fix=f"set model.{role if role != 'dit' else 'path'}")
    if text.startswith(BUNDLE):
        return _in_folder(_bundle(text.removeprefix(BUNDLE)), role)
    looked = list(_places(Path(text).expanduser(), role, base))
    found = next((path for path in looked if path.exists()), None)
    if found is not None:
        return _in_folder(found, role) if found.is_dir() else found
    hub_id = HUB_ID.fullmatch(text)
    if hub_id and (hub_id["file"] or Path(text).suffix not in ENDINGS):
        return _from_hub(hub_id["repo"], hub_id["file"], role)
    places = ", ".join(dict.fromkeys(str(path) for path in looked))
    raise ModelFileError(f"{role} = {text}: no such file or folder", why=f"looked for {places}", fix="check the path, or give a hub id")


def _places(path: Path, role: str, base: Path | None) -> Iterator[Path]:
    yield path
    if path.is_absolute():
        return
    if base is not None:
        yield base / path
    models = home() / "models"
    yield models / path
    for name in COMFY_FOLDERS.get(role, ()):
        yield models / name / path


def _bundle(name: str) -> Path:
    folder = BUNDLE_FOLDER / name
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not folder.is_dir():
        there = sorted(path.name for path in BUNDLE_FOLDER.iterdir() if path.is_dir()) if BUNDLE_FOLDER.is_dir() else []
        fix = f"bundled models: {', '.join(there)}" if there else "reinstall fluxsmith: this installation carries no bundled model"
        raise ModelFileError(f"no bundled model is called {name}", where=str(folder), fix=fix)
    return folder


def _from_hub(repo: str, file: str | None, role: str) -> Path:
    if file:
        return hub.download(repo, file)
    cached = hub.cached_snapshot(repo)
    if cached is not None:
        found = find_role(cached, role)
        if found:
            return _only(found, cached, role)
    folder = hub.download_role(repo, role)
    return _in_folder(folder, role)


def _in_folder(folder: Path, role: str) -> Path:
    found = find_role(folder, role)
    if not found:
        looked = ", ".join(str(path) for path in _search_folders(folder, role))
        raise ModelFileError(f"no file for {role} in this folder", where=str(folder), why=f"looked in {looked}", fix="give the file itself")
    return _only(found, folder, role)


def _only(found: list[Path], folder: Path, role: str) -> Path:
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ModelFileError(f"several files can be {role}: {names}", where=str(folder), fix="give one of them")
    return found[0]


def find_role(folder: Path, role: str) -> list[Path]:
    """Everything in a models folder that can play a role; the first place that has some wins, sub-folders of diffusers last."""
    for place in _search_folders(folder, role):
        found = [path for path in _candidates(place, deep=place != folder) if _plays(path, role)]
        if found:
            return found
    return []


def _search_folders(folder: Path, role: str) -> list[Path]:
    names = (*COMFY_FOLDERS.get(role, ()), *DIFFUSERS_FOLDERS.get(role, ()))
    bare = (folder / name for name in dict.fromkeys(names))
    inside = (folder / "models" / name for name in COMFY_FOLDERS.get(role, ()))
    return [folder, *(place for place in (*bare, *inside) if place.is_dir())]


def _candidates(folder: Path, *, deep: bool) -> list[Path]:
    """Weights files, each set of shards once (by its first file)."""
    paths: Iterable[Path] = folder.rglob("*") if deep else folder.iterdir()
    files = sorted(path for path in paths if path.suffix in ENDINGS and path.is_file() and not path.name.startswith("."))
    firsts = [path for path in files if (shard := SHARD.fullmatch(path.name)) is None or int(shard["number"]) == 1]
    return firsts[:MAX_CANDIDATES]


def _plays(path: Path, role: str) -> bool:
    try:
        roles = identify(path).roles()
    except FluxsmithError:
        return False  # a broken neighbour is no reason to stop; a broken file that is named is refused when it is opened
    return any(served in roles for served in PLAYS.get(role, (role,)))
