"""The Hugging Face hub, an optional door: only weights, tokenizer and number files are ever fetched, never code.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured by huggingface_hub itself.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fluxsmith.errors import ModelFileError

ALLOWED = (".safetensors", ".sft", ".json", ".txt", ".model")
NAMED = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".jinja",
)  # only when the file itself is named; pickles are converted, not opened
ROLE_FILES = {  # the first pattern with a hit is fetched
    "dit": (r"(flux|FLUX|chroma|Chroma)[^/]*\.(safetensors|sft)", r"transformer/[^/]*\.(safetensors|json)"),
    "clip_l": (r"clip_l[^/]*\.safetensors", r"text_encoder/[^/]*\.(safetensors|json)"),
    "t5xxl": (r"t5xxl_fp16\.safetensors", r"t5xxl[^/]*\.safetensors", r"text_encoder_2/[^/]*\.(safetensors|json)"),
    "ae": (r"ae\.(safetensors|sft)", r"vae/[^/]*\.(safetensors|json)", r"(taef1|diffusion_pytorch_model)[^/]*\.safetensors"),
    "lora": (r"[^/]*\.safetensors",),
}


def cached_snapshot(repo: str) -> Path | None:
    """The folder of a repository as far as it was fetched before; None if nothing is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None


def cached_file(repo: str, file: str) -> Path | None:
    """A file fetched before, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file)
    return Path(found) if isinstance(found, str) else None


def download(repo: str, file: str) -> Path:
    """Fetch one file (or take it from the cache). Raises ModelFileError with the cure."""
    if not file.endswith((*ALLOWED, *NAMED)) or ".." in file.split("/"):
        raise ModelFileError(f"{file} is not a kind of file that is fetched", where=repo, fix=f"name one of {', '.join(ALLOWED)}")
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo):
        return Path(hf_hub_download(repo, file))


def download_role(repo: str, role: str) -> Path:
    """Fetch the files of a role; returns the folder of the repository. Raises ModelFileError with the cure."""
    from huggingface_hub import list_repo_files, snapshot_download

    with _hub_errors(repo):
        names = choose(list_repo_files(repo), role)
        if not names:
            what = f"the repository has no file for {role}"
            raise ModelFileError(what, where=repo, fix="name the file: org/name:path/in/repository.safetensors")
        return Path(snapshot_download(repo, allow_patterns=names))


def list_files(repo: str) -> list[str]:
    """Names of all files of a repository. Raises ModelFileError with the cure."""
    from huggingface_hub import list_repo_files

    with _hub_errors(repo):
        return list_repo_files(repo)


def download_into(repo: str, names: Sequence[str], folder: Path) -> None:
    """Fetch these files to their places below a folder, continuing what was begun. Raises ModelFileError with the cure."""
    from huggingface_hub import snapshot_download

    with _hub_errors(repo):
        snapshot_download(repo, allow_patterns=list(names), local_dir=folder)


def choose(names: Sequence[str], role: str) -> list[str]:
    """Which of a repository's files make up a role; a diffusers folder only when there is no single file."""
    for pattern in ROLE_FILES.get(role, ()):
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return sorted(found)
    return []


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    url = f"https://huggingface.co/{repo}"
    try:
        yield
    except GatedRepoError as error:
        fix = f"accept the licence at {url}, then `hf auth login`"
        raise ModelFileError("the licence of this repository must be accepted first", where=repo, fix=fix) from error
    except RepositoryNotFoundError as error:
        fix = "check the id; for a local file check the path"
        raise ModelFileError("no such file here and no such repository on the hub", where=repo, fix=fix) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        what = "not in the hub cache, and the hub cannot be reached"
        raise ModelFileError(what, where=repo, fix="unset HF_HUB_OFFLINE, check the network, or give a local file") from error
    except EntryNotFoundError as error:
        raise ModelFileError("the repository has no such file", where=repo, fix=f"look at {url}/tree/main") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelFileError("download failed", where=repo, why=str(error)[:200], fix="try again, or give a local file") from error
