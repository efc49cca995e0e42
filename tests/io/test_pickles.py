"""Public weights that exist only as pickles become safetensors once; anything but tensors ends in one error, without an effect."""

import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxsmith.errors import ModelFileError
from fluxsmith.io import pickle_reader, pickles
from fluxsmith.io.identify import identify
from fluxsmith.io.safetensors import open_weights

TENSORS = {"latents": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "norm.bias": torch.ones(4)}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXSMITH_HOME", str(tmp_path / "home"))


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_weights(path) as weights:
        return {name: weights.tensor(name) for name in weights}


def in_process(path: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The same code without a process around it, for speed."""
    pickle_reader.convert(path, tmp_path / "out.safetensors", {})
    return read(tmp_path / "out.safetensors")


def test_public_pickle_of_infiniteyou(tmp_path: Path, fixtures_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image_proj_model.bin"
    path.write_bytes((fixtures_root / "infiniteyou-tiny/image_proj_model.bin").read_bytes())
    found = identify(path)
    assert (found.role, found.prefix) == ("face_projector", "image_proj.")
    assert "written once to" in capsys.readouterr().err
    expected = read(fixtures_root / "infiniteyou-tiny/image_proj.safetensors")
    made = read(path)
    assert capsys.readouterr().err == ""  # the second time what was made is taken
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["image_proj_model.bin", "image_proj_model.safetensors"]


def test_a_replaced_pickle_is_converted_again(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", {"a": torch.zeros(3)})
    assert torch.equal(read(path)["a"], torch.zeros(3))
    saved(path, {"a": torch.ones(3)})
    assert torch.equal(read(path)["a"], torch.ones(3))


def test_somebody_elses_file_is_not_written_over(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", TENSORS)
    (tmp_path / "m.safetensors").write_bytes(b"mine")
    assert read(path).keys() == TENSORS.keys()
    assert (tmp_path / "m.safetensors").read_bytes() == b"mine"
    assert [file.name for file in (tmp_path / "home/converted").iterdir()] == [f"m-{pickles.fingerprint(path)[:16]}.safetensors"]


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "read-only" / "m.bin" if (tmp_path / "read-only").mkdir() is None else tmp_path, TENSORS)
    monkeypatch.setattr(os, "access", lambda folder, mode: "read-only" not in str(folder))
    assert pickles.readable(path, note=lambda _: None).parent == tmp_path / "home/converted"


@pytest.mark.parametrize(
    "value",
    [
        TENSORS,
        OrderedDict(TENSORS),
        {"state_dict": TENSORS, "epoch": 3},
        {"model_state": {"module": TENSORS}},
        {name: torch.nn.Parameter(tensor) for name, tensor in TENSORS.items()},
        {"latents": TENSORS["latents"], "norm": {"bias": TENSORS["norm.bias"]}, "step": 7, "names": ["a"]},
    ],
)
def test_layouts(tmp_path: Path, value: Any) -> None:
    made = in_process(saved(tmp_path / "m.bin", value), tmp_path)
    assert made.keys() == TENSORS.keys()
    assert all(torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_windows_on_storages(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "turned": base.t(),
        "part": base[1:3, 2:5],
        "row": base[2],
        "wide": torch.ones(3, 1).expand(3, 5),
        "one": torch.tensor(5),
        "none": torch.zeros(0, 3),
        "column": base[:, 1],
        "flags": torch.tensor([True, False]),
        "small": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "base": base,
    }
    made = in_process(saved(tmp_path / "m.bin", tensors), tmp_path)
    for name, tensor in tensors.items():
        assert (made[name].dtype, made[name].shape) == (tensor.dtype, tensor.shape)
        assert made[name].tolist() == tensor.tolist()


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *values: Any) -> None:
        self.call = (function, values)

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, description: bytes, data: bytes = b"", **settings: Any) -> Path:
    with zipfile.ZipFile(path, "w", **settings) as file:
        file.writestr("archive/data.pkl", description)
        file.writestr("archive/data/0", data)
    return path


class Stands:
    """A storage named by the persistent id given."""

    def __init__(self, pid: Any) -> None:
        self.pid = pid


class Naming(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Stands) else None


def described(value: Any) -> bytes:
    out = io.BytesIO()
    Naming(out, 2).dump(value)
    return out.getvalue()


def tensor(offset: Any = 0, shape: Any = (2,), strides: Any = (1,), *, elements: int = 2, key: str = "0") -> Calls:
    storage = Stands(("storage", torch.FloatStorage, key, "cpu", elements))
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, OrderedDict())


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a command": (lambda path: archive(path, described({"a": Calls(os.system, f"touch {path.parent}/hacked")})), "no part of a tensor"),
    "a process": (
        lambda path: archive(path, described({"a": Calls(subprocess.Popen, ["touch", f"{path.parent}/hacked"])})),
        "no part of a tensor",
    ),
    "eval": (lambda path: archive(path, described({"a": Calls(eval, f"open('{path.parent}/hacked', 'w')")})), "no part of a tensor"),
    "getattr chain": (lambda path: archive(path, b"ccollections\nOrderedDict.__init__.__globals__\n."), "no part of a tensor"),
    "other torch function": (lambda path: archive(path, b"ctorch\nload\n."), "no part of a tensor"),
    "huge text": (lambda path: archive(path, b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"."), "damaged"),
    "huge bytearray": (lambda path: archive(path, b"\x80\x05\x96" + (1 << 45).to_bytes(8, "little") + b"."), "damaged|memory"),
    "huge frame": (lambda path: archive(path, b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"."), "damaged"),
    "deep nesting": (lambda path: archive(path, b"(" * 200_000 + b"t" * 200_000 + b"."), "stopped|damaged|no tensors"),
    "tensor beyond its storage": (lambda path: archive(path, described({"a": tensor(0, (1 << 20,))}), b"\0" * 8), "beyond its storage"),
    "storage that lies": (lambda path: archive(path, described({"a": tensor(0, (9,), elements=9)}), b"\0" * 8), "shorter than its tensors"),
    "expanded to a bomb": (lambda path: archive(path, described({"a": tensor(0, (1 << 30, 2), (0, 1))}), b"\0" * 8), "share so much"),
    "negative offset": (lambda path: archive(path, described({"a": tensor(-1)}), b"\0" * 8), "without a storage"),
    "shape of texts": (lambda path: archive(path, described({"a": tensor(0, ("x",))}), b"\0" * 8), "row of numbers"),
    "storage outside": (lambda path: archive(path, described({"a": tensor(key="../../etc/passwd")}), b"\0" * 8), "without a place"),
    "missing storage": (lambda path: archive(path, described({"a": tensor(key="7")}), b"\0" * 8), "damaged"),
    "zip bomb": (lambda path: archive(path, b"\0" * 50_000_000, compression=zipfile.ZIP_DEFLATED), "compressed"),
    "two descriptions": (lambda path: _twice(path), "no data.pkl"),
    "another zip": (lambda path: _other(path), "no data.pkl"),
    "wrong magic": (lambda path: _bytes(path, b"MZ" + bytes(100)), "no torch archive"),
    "bare pickle": (lambda path: _bytes(path, pickle.dumps({"a": Calls(os.system, f"touch {path.parent}/hacked")}, 2)), "before 1.6"),
    "cut archive": (lambda path: _bytes(path, archive(path, described({"a": tensor()}), b"\0" * 8).read_bytes()[:-30]), "damaged"),
    "empty": (lambda path: _bytes(path, b""), "no torch archive"),
    "no tensors": (lambda path: archive(path, described({"a": 1})), "no tensors"),
    "list": (lambda path: archive(path, described([1])), "no tensors"),
}


def _bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _twice(path: Path) -> Path:
    with zipfile.ZipFile(archive(path, described({"a": tensor()})), "a") as file:
        file.writestr("other/data.pkl", b".")
    return path


def _other(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", b"hello")
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_anything_else_ends_in_one_error(tmp_path: Path, name: str) -> None:
    make, why = HOSTILE[name]
    path = make(tmp_path / "m.bin")
    with pytest.raises(ModelFileError, match=f"(?s)not converted; nothing of it was executed.*({why})") as caught:
        open_weights(path)
    assert (caught.value.exit_code, len(caught.value.lines())) == (4, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["m.bin"]


def test_damaged_values_are_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"a": torch.arange(1000.0)})
    content = path.read_bytes()
    place = content.index(torch.arange(1000.0).numpy().tobytes()[400:440])
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(ModelFileError, match="damaged"):
        open_weights(path)


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(pickles, "READER", slow)
    monkeypatch.setattr(pickles, "SECONDS", 0.2)
    with pytest.raises(ModelFileError, match="took more than"):
        open_weights(saved(tmp_path / "m.bin", TENSORS))


def test_limits_hold_in_the_process(tmp_path: Path) -> None:
    """The reader's own process cannot take memory, write without end, or start another."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(pickle_reader.__file__).parent)!r})\n"
        "import pickle_reader, resource; pickle_reader.restrict(1000)\n"
        "print([resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC)])\n"
        "bytearray(2 << 30)"
    )
    done = subprocess.run([os.sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"[{(1 << 30) + 2000}, {4000 + (64 << 20)}, 0]"
    assert "MemoryError" in done.stderr
