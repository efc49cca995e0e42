"""A role is found in files, folders of two layouts, the hub's cache and the bundle; errors say where it was looked for."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from fluxsmith.errors import ModelFileError
from fluxsmith.io import hub, sources
from fluxsmith.io.sources import resolve

FILES = {"dit": "flux-dev-tiny", "clip_l": "clip_l-tiny", "t5xxl": "t5-tiny", "ae": "ae-tiny"}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def put(fixtures_root: Path, tmp_path: Path):
    def place(role: str, target: str) -> Path:
        path = tmp_path / target
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(fixtures_root / FILES[role] / "weights.safetensors", path)
        return path

    return place


def test_a_file_is_itself(put) -> None:
    path = put("dit", "a.safetensors")
    assert resolve(path, "dit") == path
    assert resolve("a.safetensors", "dit") == Path("a.safetensors")


def test_relative_to_the_config_and_to_home(put, tmp_path: Path) -> None:
    path = put("dit", "conf/a.safetensors")
    assert resolve("a.safetensors", "dit", base=tmp_path / "conf") == path
    kept = put("ae", "home/models/vae/ae.sft")
    assert resolve("ae.sft", "ae") == kept


def test_diffusers_folder(put, tmp_path: Path) -> None:
    names = {"dit": "transformer", "clip_l": "text_encoder", "t5xxl": "text_encoder_2", "ae": "vae"}
    paths = {role: put(role, f"pipe/{name}/model.safetensors") for role, name in names.items()}
    for role, path in paths.items():
        assert resolve(tmp_path / "pipe", role) == path


def test_comfy_folder_tells_encoders_apart(put, tmp_path: Path) -> None:
    clip = put("clip_l", "ComfyUI/models/text_encoders/one.safetensors")
    t5 = put("t5xxl", "ComfyUI/models/clip/two.safetensors")
    dit = put("dit", "ComfyUI/models/unet/sub/flux.safetensors")
    for folder in ("ComfyUI", "ComfyUI/models"):
        assert resolve(tmp_path / folder, "clip_l") == clip
        assert resolve(tmp_path / folder, "t5xxl") == t5
        assert resolve(tmp_path / folder, "dit") == dit


def test_several_candidates_are_listed(put, tmp_path: Path) -> None:
    put("t5xxl", "m/text_encoders/t5_fp16.safetensors")
    put("t5xxl", "m/text_encoders/t5_fp8.safetensors")
    with pytest.raises(
        ModelFileError, match=r"several files can be t5xxl: text_encoders/t5_fp16.safetensors, text_encoders/t5_fp8.safetensors"
    ):
        resolve(tmp_path / "m", "t5xxl")


def test_broken_neighbours_do_not_matter(put, tmp_path: Path) -> None:
    ae = put("ae", "m/vae/ae.safetensors")
    (tmp_path / "m/vae/broken.safetensors").write_bytes(b"x" * 30)
    assert resolve(tmp_path / "m", "ae") == ae


def test_nothing_found_lists_the_places(tmp_path: Path, own_home: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        resolve("missing.safetensors", "dit", base=tmp_path / "conf")
    for place in ("missing.safetensors", str(tmp_path / "conf"), str(own_home / "models" / "unet")):
        assert place in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match="no file for ae in this folder"):
        resolve(tmp_path / "empty", "ae")
    with pytest.raises(ModelFileError, match="no file is given for clip_l"):
        resolve("", "clip_l")


def test_bundle(put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put("dit", "bundle/flux-shapes/dit.safetensors")
    monkeypatch.setattr(sources, "BUNDLE_FOLDER", tmp_path / "bundle")
    assert resolve("bundle:flux-shapes", "dit") == path
    for name in ("nope", "../bundle/flux-shapes"):
        with pytest.raises(ModelFileError, match="no bundled model"):
            resolve(f"bundle:{name}", "dit")


def test_hub_cache_is_used_without_network(put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ae = put("ae", "snap/ae.safetensors")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **settings: str(tmp_path / "snap"))
    assert resolve("org/name", "ae") == ae


def test_hub_offline_and_named_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(repo: str, **settings: object) -> str:
        raise LocalEntryNotFoundError("no snapshot")

    def offline(repo: str, *names: str) -> list[str]:
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE=1")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    with pytest.raises(ModelFileError, match="cannot be reached.*unset HF_HUB_OFFLINE"):
        resolve("org/name", "ae")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: f"/cache/{repo}/{file}")
    assert resolve("org/name:sub/a.safetensors", "dit") == Path("/cache/org/name/sub/a.safetensors")
    with pytest.raises(ModelFileError, match="not a kind of file that is fetched"):
        resolve("org/name:evil.py", "dit")


def test_hub_fetches_only_the_role(put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    names = [
        "flux1-dev.safetensors",
        "ae.safetensors",
        "transformer/a-00001-of-00001.safetensors",
        "text_encoder/model.safetensors",
        "run.py",
    ]

    def snapshot(repo: str, *, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("nothing yet")
        asked.append(allow_patterns or [])
        put("dit", "snap/flux1-dev.safetensors")
        return str(tmp_path / "snap")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: names)
    assert resolve("org/name", "dit").name == "flux1-dev.safetensors"
    assert asked == [["flux1-dev.safetensors"]]
    assert hub.choose(names, "clip_l") == ["text_encoder/model.safetensors"]
    assert hub.choose(names, "t5xxl") == []
