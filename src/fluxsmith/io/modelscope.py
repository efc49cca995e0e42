"""ModelScope's plain HTTP interface: what a repository holds, and one file at a time, continued where it stopped, checked, renamed.

`list_files(Hub("https://www.modelscope.cn"), "AI-ModelScope/FLUX.1-dev")`. The only door to it; its SDK is not needed.
Addresses: /api/v1/models/ID/repo/files?Revision=&Recursive= and /api/v1/models/ID/repo?Revision=&FilePath= (with Range).
"""

import fcntl
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from fluxsmith.errors import ModelFileError, StorageError
from fluxsmith.io.durable import Disk, readable_size

REVISION = "master"
CHUNK = 1 << 20
TRIES, FIRST_WAIT = 4, 0.5  # seconds, doubled after each try without progress
TIMEOUT = 60.0
MAX_LISTING = 32 << 20
BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


class Hub(NamedTuple):
    """Where to ask, and as whom."""

    endpoint: str = "https://www.modelscope.cn"
    token: str = ""


class RemoteFile(NamedTuple):
    """One file of a repository; `sha256` is empty where the hub names none."""

    path: str
    size: int
    sha256: str = ""


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Redirects to storage servers are followed, but never from https to anything else, and without the cookie."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme != urllib.parse.urlsplit(req.full_url).scheme:
            raise urllib.error.URLError(f"redirected to another kind of address: {newurl[:100]}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def list_files(hub: Hub, repo: str) -> list[RemoteFile]:
    """All files of a repository. Raises ModelFileError."""
    url = f"{hub.endpoint}/api/v1/models/{urllib.parse.quote(repo)}/repo/files?Revision={REVISION}&Recursive=True"
    try:
        with _opened(hub, url, 0) as answer:
            found = json.loads(answer.read(MAX_LISTING))
    except urllib.error.HTTPError as error:
        error.close()
        raise _refused(repo, hub, error.code) from error
    except (*BROKEN, ValueError) as error:
        raise _unreachable(repo, hub, error) from error
    data = found.get("Data") if isinstance(found, dict) else None
    if not isinstance(data, dict) or not isinstance(data.get("Files"), list):
        raise ModelFileError("the hub's answer cannot be understood", where=repo, why=str(found)[:200], fix="try again later")
    entries = [entry for entry in data["Files"] if isinstance(entry, dict) and entry.get("Type") != "tree"]
    return [RemoteFile(str(entry.get("Path")), int(entry.get("Size") or 0), str(entry.get("Sha256") or "")) for entry in entries]


def download(hub: Hub, repo: str, file: RemoteFile, target: Path, *, disk: Disk | None = None) -> Path:
    """One file to `target`, complete and checked or not there at all; a piece left by an earlier try is continued.

    Raises ModelFileError (hub, network, digest) and StorageError (space).
    """
    disk = disk or Disk()
    disk.make_folder(target.parent)
    piece = target.with_name(f".{target.name}.{file.sha256[:12] or file.size}.part")
    with _locked(piece) as out:
        if target.exists() and target.stat().st_size == file.size:  # another program was faster
            piece.unlink(missing_ok=True)
            return target
        _room(disk, target, file.size - out.seek(0, 2))
        _receive(hub, repo, file, out)
        _check(repo, file, piece)
        disk.fsync(out.fileno(), piece)
        disk.rename(piece, target)
        disk.fsync_folder(target.parent)
    return target


@contextmanager
def _locked(piece: Path) -> Iterator[IO[bytes]]:
    """The piece open for appending, by one program at a time."""
    while True:
        with piece.open("ab") as out:
            fcntl.flock(out, fcntl.LOCK_EX)
            if piece.exists() and os.path.samestat(piece.stat(), os.fstat(out.fileno())):  # nobody renamed it while we waited
                yield out
                return


def _room(disk: Disk, target: Path, needed: int) -> None:
    free = disk.free_bytes(target.parent)
    if needed > free:
        why = f"{readable_size(needed)} are missing of it, {readable_size(free)} are free"
        raise StorageError(f"no room to download {target.name}", where=str(target.parent), why=why, fix="free some space")


def _receive(hub: Hub, repo: str, file: RemoteFile, out: IO[bytes]) -> None:
    """Append what is missing; a broken connection is taken up again as long as something arrives."""
    query = urllib.parse.urlencode({"Revision": REVISION, "FilePath": file.path}, quote_via=urllib.parse.quote)
    url = f"{hub.endpoint}/api/v1/models/{urllib.parse.quote(repo)}/repo?{query}"
    tries, reason = 0, "the connection ended early"
    while (start := out.seek(0, 2)) < file.size:
        try:
            with _opened(hub, url, start) as answer:
                if start and answer.status != http.client.PARTIAL_CONTENT:  # it sends everything again
                    out.truncate(0)
                _append(answer, out, file)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < http.client.INTERNAL_SERVER_ERROR:
                raise _refused(f"{repo}: {file.path}", hub, error.code) from error
            reason = str(error)
        except BROKEN as error:
            reason = str(error)
        tries = 0 if out.seek(0, 2) > start else tries + 1
        if tries == TRIES:
            raise _unreachable(f"{repo}: {file.path}", hub, reason)
        if tries:
            time.sleep(FIRST_WAIT * 2 ** (tries - 1))


def _append(answer: http.client.HTTPResponse, out: IO[bytes], file: RemoteFile) -> None:
    while data := answer.read(CHUNK):
        if out.tell() + len(data) > file.size:
            out.truncate(0)
            raise ModelFileError(f"{file.path}: the hub sends more than the {file.size} bytes it announced", fix="try again later")
        out.write(data)


def _check(repo: str, file: RemoteFile, piece: Path) -> None:
    digest = hashlib.sha256()
    with piece.open("rb") as content:
        while data := content.read(CHUNK):
            digest.update(data)
    if file.sha256 and digest.hexdigest() != file.sha256.lower():
        piece.unlink()
        why = f"SHA-256 is {digest.hexdigest()}, the hub names {file.sha256}"
        raise ModelFileError(f"{file.path} arrived damaged and was thrown away", where=repo, why=why, fix="download it again")


def _opened(hub: Hub, url: str, start: int) -> http.client.HTTPResponse:
    if urllib.parse.urlsplit(url).scheme not in ("https", "http"):
        raise ModelFileError("not a web address", where=hub.endpoint, fix="MODELSCOPE_ENDPOINT must begin with https://")
    headers = {"User-Agent": "fluxsmith"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  scheme checked above
    if hub.token:
        request.add_unredirected_header("Cookie", f"m_session_id={hub.token}")
    return urllib.request.build_opener(_SameScheme).open(request, timeout=TIMEOUT)


def _refused(where: str, hub: Hub, code: int) -> ModelFileError:
    if code in (401, 403):
        fix = f"accept its licence at {hub.endpoint}, set MODELSCOPE_API_TOKEN, or download it by hand"
        return ModelFileError("the hub wants to know who asks", where=where, why=f"answer {code}", fix=fix)
    fix = f"check the name at {hub.endpoint}; for files that are here give their folder, or set DIFFSYNTH_DOWNLOAD_SOURCE=huggingface"
    return ModelFileError("no such repository or file on ModelScope", where=where, why=f"answer {code}", fix=fix)


def _unreachable(where: str, hub: Hub, reason: object) -> ModelFileError:
    fix = "check the network and try again (what has arrived is kept), or give a local file"
    return ModelFileError(f"{hub.endpoint} cannot be reached", where=where, why=str(reason)[:200], fix=fix)
