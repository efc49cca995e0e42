"""Models by id and pattern: taken from here when they are complete, else from a hub, continued, checked, and never half there."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from fluxsmith.errors import ModelFileError
from fluxsmith.io import modelscope, sources
from fluxsmith.io.fetch import fetch

ID = "black-forest-labs/FLUX.1-dev"
REPO = {
    "flux1-dev.safetensors": b"x" * 3000,
    "text_encoder_2/model-00001-of-00002.safetensors": b"1" * 700,
    "text_encoder_2/model-00002-of-00002.safetensors": b"2" * 700,
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"#",
    "ip-adapter.bin": b"\x80\x02",
    "setup.py": b"import os",
    "../outside.json": b"{}",
}


class Server(http.server.ThreadingHTTPServer):
    """A hub with one repository. `cut`: bytes after which the next answers end; `wrong`: content that fits no digest."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.cookies: list[str] = []
        self.cut: list[int] = []
        self.files = dict(REPO)
        self.digests = {name: hashlib.sha256(data).hexdigest() for name, data in REPO.items()}
        self.status = 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        place = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(place.query))
        self.server.asked.append(place.path)
        self.server.cookies.append(self.headers.get("Cookie", ""))
        if not place.path.startswith(f"/api/v1/models/{ID}/") or self.server.status != 200:
            self.send_error(404 if self.server.status == 200 else self.server.status)
            return
        if place.path.endswith("/repo/files"):
            entries: list[dict[str, Any]] = [{"Path": "tokenizer", "Type": "tree"}]
            entries += [{"Path": n, "Type": "blob", "Size": len(d), "Sha256": self.server.digests[n]} for n, d in REPO.items()]
            self.answer(200, json.dumps({"Code": 200, "Data": {"Files": entries}}).encode())
            return
        data, start = self.server.files[query["FilePath"]], 0
        if "Range" in self.headers:
            self.server.ranges.append(self.headers["Range"])
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.answer(206 if start else 200, data[start:], self.server.cut.pop(0) if self.server.cut else None)

    def answer(self, status: int, data: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL_BASE_PATH", "SKIP_DOWNLOAD", "DOWNLOAD_SOURCE"):
        monkeypatch.delenv(f"DIFFSYNTH_{name}", raising=False)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(modelscope, "FIRST_WAIT", 0.001)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.address)
        yield server
        server.shutdown()
        thread.join()


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / ID / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(REPO.get(name, b"here"))


@pytest.mark.ledger("DS-01")
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("flux1-dev.safetensors", ["flux1-dev.safetensors"]),
        (
            "text_encoder_2/*.safetensors",
            ["text_encoder_2/model-00001-of-00002.safetensors", "text_encoder_2/model-00002-of-00002.safetensors"],
        ),
        ("tokenizer/", ["tokenizer"]),
        ("ip-adapter.bin", ["ip-adapter.bin"]),
        ("", [""]),
    ],
)
def test_downloaded_once_then_the_hub_is_left_alone(
    server: Server, pattern: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [Path("models") / ID / name for name in expected]
    assert fetch(ID, pattern) == wanted
    assert "downloading" in capsys.readouterr().err
    asked = len(server.asked)
    assert fetch(ID, pattern) == wanted
    assert len(server.asked) == asked
    for path in Path("models").rglob("*"):
        assert path.is_dir() or path.read_bytes() == REPO[path.relative_to(Path("models") / ID).as_posix()]


def test_code_pickles_and_strange_paths_are_not_fetched_unasked(server: Server, tmp_path: Path) -> None:
    fetch(ID)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "vocab.json" in names
    assert not names & {"setup.py", "ip-adapter.bin", "outside.json"}
    with pytest.raises(ModelFileError, match="setup.py"):
        fetch(ID, "*.py")


@pytest.mark.ledger("DS-34")
@pytest.mark.parametrize("how", ["argument", "environment", "nothing"])
def test_complete_local_files_need_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    put(tmp_path / "mine", "flux1-dev.safetensors", "tokenizer/vocab.json")
    if how == "environment":
        monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    skip = True if how == "argument" else None
    assert fetch(ID, "flux1-*.safetensors", root=tmp_path / "mine", skip=skip) == [tmp_path / "mine" / ID / "flux1-dev.safetensors"]
    assert fetch(ID, "tokenizer/", root=tmp_path / "mine", skip=skip) == [tmp_path / "mine" / ID / "tokenizer"]


def test_a_pickle_is_there_once(tmp_path: Path) -> None:
    """Its conversion lies beside it from the first use on."""
    put(tmp_path / "models", "ip-adapter.bin")
    assert [path.name for path in fetch(ID, "ip-adapter*")] == ["ip-adapter.bin"]
    put(tmp_path / "models", "ip-adapter.safetensors")
    assert [path.name for path in fetch(ID, "ip-adapter*")] == ["ip-adapter.safetensors"]
    assert [path.name for path in fetch(ID, "ip-adapter.bin")] == ["ip-adapter.bin"]


def test_given_folder_beats_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DiffSynth-Studio documents it so, and does the opposite."""
    put(tmp_path / "given", "flux1-dev.safetensors")
    put(tmp_path / "environment", "flux1-dev.safetensors")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "environment"))
    assert fetch(ID, "flux1-dev.safetensors", root=tmp_path / "given")[0].is_relative_to(tmp_path / "given")
    assert fetch(ID, "flux1-dev.safetensors")[0].is_relative_to(tmp_path / "environment")


def test_missing_shard_is_fetched(server: Server, tmp_path: Path) -> None:
    put(tmp_path / "models", "text_encoder_2/model-00002-of-00002.safetensors")
    assert len(fetch(ID, "text_encoder_2/*.safetensors")) == 2
    assert len(server.asked) == 2  # the listing and one file


def test_nothing_matches(server: Server, tmp_path: Path) -> None:
    put(tmp_path / "models", "tokenizer/vocab.json")
    with pytest.raises(ModelFileError, match=r"no file matches flux2\*.*tokenizer/vocab.json"):
        fetch(ID, "flux2*", skip=True)
    with pytest.raises(ModelFileError, match=r"no file matches flux2\*.*flux1-dev.safetensors"):
        fetch(ID, "flux2*")


def test_broken_connection_is_taken_up_again(server: Server) -> None:
    server.cut = [1000, 500]
    path = fetch(ID, "flux1-dev.safetensors")[0]
    assert path.read_bytes() == REPO["flux1-dev.safetensors"]
    assert server.ranges == ["bytes=1000-", "bytes=1500-"]


def test_cut_download_is_continued_by_the_next_call(server: Server) -> None:
    server.cut = [3, 1000, 0, 0, 0, 0]
    with pytest.raises(ModelFileError, match="cannot be reached"):
        fetch(ID, "[f]*.safetensors")
    assert not list(Path("models").rglob("*.safetensors"))
    server.cut = []
    assert fetch(ID, "[f]*.safetensors")[0].stat().st_size == 3000
    assert not list(Path("models").rglob(".*"))


def test_damaged_file_is_thrown_away(server: Server) -> None:
    server.files["flux1-dev.safetensors"] = b"y" * 3000
    with pytest.raises(ModelFileError, match="arrived damaged"):
        fetch(ID, "flux1-dev.safetensors")
    assert not list(Path("models").rglob("*flux1*"))


def test_folder_that_was_cut_short_is_not_taken_for_whole(server: Server) -> None:
    server.digests["tokenizer/vocab.json"] = "0" * 64
    with pytest.raises(ModelFileError, match="damaged"):
        fetch(ID, "tokenizer/")
    server.digests["tokenizer/vocab.json"] = hashlib.sha256(b"{}").hexdigest()
    assert sorted(path.name for path in fetch(ID, "tokenizer/")[0].iterdir()) == ["merges.txt", "vocab.json"]


def test_token_goes_to_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    fetch(ID, "flux1-dev.safetensors")
    assert set(server.cookies) == {"m_session_id=secret"}
    server.status = 403
    with pytest.raises(ModelFileError, match="MODELSCOPE_API_TOKEN") as caught:
        fetch(ID, "tokenizer/")
    assert "secret" not in str(caught.value)


def test_unknown_repository_and_hub_that_is_away(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFileError, match="no such repository or file on ModelScope"):
        fetch("nobody/nothing")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelFileError, match="cannot be reached"):
        fetch(ID, "flux1-dev.safetensors")


@pytest.mark.parametrize("model_id", ["flux", "../up/x", "a/b/c", "a/..", "/a/b", "a b/c"])
def test_strange_ids_are_refused(model_id: str) -> None:
    with pytest.raises(ModelFileError, match="is no model id"):
        fetch(model_id)


@pytest.mark.parametrize("pattern", ["../x", "/etc/*", "a/../../b", "..\\x"])
def test_patterns_stay_inside(pattern: str) -> None:
    with pytest.raises(ModelFileError, match="leaves the repository"):
        fetch(ID, pattern)


def test_switches_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "maybe")
    with pytest.raises(ModelFileError, match="neither yes nor no"):
        fetch(ID)
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "")
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "civitai")
    with pytest.raises(ModelFileError, match="no such hub"):
        fetch(ID)
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "www.modelscope.ai")
    assert sources.download_settings("modelscope", None, None).hub.endpoint == "https://www.modelscope.ai"


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo: str, *, allow_patterns: list[str], local_dir: Path) -> None:
        assert repo == ID
        put(Path("models"), *allow_patterns)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: list(REPO))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "huggingface")
    assert fetch(ID, "tokenizer/") == [Path("models") / ID / "tokenizer"]
    assert sorted(path.name for path in Path("models").rglob("*") if path.is_file()) == ["merges.txt", "vocab.json"]
