"""The tokenizer is found near the encoder or where it was configured; otherwise every place is listed."""

import json
from pathlib import Path

import pytest

from fluxsmith.errors import ModelFileError
from fluxsmith.io import hub
from fluxsmith.io.tokenizer_files import find_tokenizer


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cached_file", lambda repo, file: None)


def tokenizer(folder: Path, kind: str = "", model: str = "BPE") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": model}}))
    if kind:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    return folder


@pytest.mark.parametrize("place", [".", "tokenizer", "../tokenizer"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_near_the_encoder(tmp_path: Path, place: str, whole_folder: bool) -> None:
    folder = tokenizer((tmp_path / "enc" / place).resolve(), "CLIPTokenizer")
    (tmp_path / "enc").mkdir(exist_ok=True)
    encoder = tmp_path / "enc" if whole_folder else tmp_path / "enc" / "clip_l.safetensors"
    assert find_tokenizer("clip_l", encoder).resolve() == folder


def test_the_other_encoders_tokenizer_is_not_taken(tmp_path: Path) -> None:
    tokenizer(tmp_path, "CLIPTokenizer")
    with pytest.raises(ModelFileError):
        find_tokenizer("t5xxl", tmp_path / "t5.safetensors")
    tokenizer(tmp_path / "b", model="Unigram")
    assert find_tokenizer("t5xxl", tmp_path / "b" / "t5.safetensors") == tmp_path / "b"
    with pytest.raises(ModelFileError):
        find_tokenizer("clip_l", tmp_path / "b" / "clip.safetensors")


def test_loose_files(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ModelFileError):
        find_tokenizer("clip_l", tmp_path / "x")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "spiece.model").write_bytes(b"")
    assert find_tokenizer("clip_l", tmp_path / "x") == tmp_path
    assert find_tokenizer("t5xxl", tmp_path / "x") == tmp_path


def test_configured_folder_wins_and_must_be_one(tmp_path: Path) -> None:
    tokenizer(tmp_path / "tokenizer")
    mine = tokenizer(tmp_path / "mine")
    assert find_tokenizer("clip_l", tmp_path / "clip.safetensors", str(mine)) == mine
    with pytest.raises(ModelFileError, match=r"model\.tokenizer: no tokenizer in this folder"):
        find_tokenizer("clip_l", tmp_path / "clip.safetensors", tmp_path / "none")


def test_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tokenizer(tmp_path / "snap")
    wanted = ("google/t5-v1_1-xxl", "tokenizer.json")
    monkeypatch.setattr(hub, "cached_file", lambda repo, file: folder / "tokenizer.json" if (repo, file) == wanted else None)
    assert find_tokenizer("t5xxl", tmp_path / "m" / "t5.safetensors") == folder


def test_error_lists_every_place(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        find_tokenizer("t5xxl", tmp_path / "m" / "t5.safetensors")
    text = str(caught.value)
    for place in (
        f"beside the encoder ({tmp_path}/m)",
        f"{tmp_path}/m/tokenizer_2",
        f"{tmp_path}/tokenizer_2",
        "model.tokenizer_2 (not set)",
        "hub cache",
    ):
        assert place in text
    assert "google/t5-v1_1-xxl into" in text
