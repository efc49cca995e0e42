"""Files we write are the library's byte for byte; files we read give the tensors that were written, one at a time."""

import json
import resource
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fluxsmith.errors import ModelFileError
from fluxsmith.io.durable import Disk
from fluxsmith.io.safetensors import TORCH_DTYPES, Lazy, open_weights, read_header, save_weights, tensor_bytes


def samples() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"t_{name}": (torch.rand(3, 5) * 100).to(dtype) for name, dtype in TORCH_DTYPES.items() if dtype is not torch.complex64}
    made["t_C64"] = torch.complex(torch.rand(2), torch.rand(2))
    return made | {"scalar": torch.tensor(3, dtype=torch.int64), "empty": torch.empty(0, 4), "view": torch.rand(6, 4)[::2].T}


def test_every_dtype_survives(tmp_path: Path) -> None:
    tensors = samples()
    record = save_weights(tmp_path / "a.safetensors", tensors, {"é": "x"})
    assert record.size == (tmp_path / "a.safetensors").stat().st_size
    with open_weights(tmp_path / "a.safetensors") as weights:
        assert weights.keys() == tensors.keys()
        assert weights.metadata == {"é": "x"}
        for name, tensor in tensors.items():
            read = weights.tensor(name)
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert bytes(tensor_bytes(read)) == bytes(tensor_bytes(tensor))


def test_bytes_equal_the_librarys(tmp_path: Path) -> None:
    tensors = {
        name: tensor.contiguous() for name, tensor in samples().items() if name not in ("t_F8_E8M0", "t_F8_E4M3FNUZ", "t_F8_E5M2FNUZ")
    }
    save_weights(tmp_path / "ours.safetensors", tensors, {"one": "key"})
    assert (tmp_path / "ours.safetensors").read_bytes() == safetensors.torch.save(tensors, {"one": "key"})


def test_views_of_a_tensor(tmp_path: Path) -> None:
    """Slices, a single value with a stride of its own, turned matrices, offsets."""
    whole = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    views = {"one": whole[1, ::11], "column": whole[:, 2], "turned": whole.T, "row": whole[2], "scalar": whole[3, 3], "none": whole[:0]}
    save_weights(tmp_path / "a.safetensors", views, {})
    with open_weights(tmp_path / "a.safetensors") as stored:
        assert all(torch.equal(stored.tensor(name), view) for name, view in views.items())


def test_library_reads_ours(tmp_path: Path) -> None:
    tensors = samples()
    save_weights(tmp_path / "a.safetensors", tensors, {"a": "b", "c": "d"})
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["view"], tensors["view"])
    assert torch.equal(loaded["t_F8_E4M3"].float(), tensors["t_F8_E4M3"].float())


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    a, b = torch.rand(3), torch.rand(4)
    first = save_weights(tmp_path / "1.sft", {"a": a, "b": b}, {"x": "1", "y": "2"})
    assert first == save_weights(tmp_path / "2.sft", {"b": b, "a": a}, {"y": "2", "x": "1"})


def test_cast_on_reading(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.sft", {"a": torch.tensor([1.5, 2.0], dtype=torch.float8_e4m3fn)}, {})
    with open_weights(tmp_path / "a.sft") as weights:
        read = weights.tensor("a", dtype=torch.float32)
    assert read.tolist() == [1.5, 2.0]
    assert read.dtype == torch.float32


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.sft", {"a": torch.zeros(1)}, {})
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "a.sft").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_lazy_tensors_are_made_in_turn(tmp_path: Path) -> None:
    alive: list[str] = []

    def make(name: str) -> torch.Tensor:
        alive.append(name)
        return torch.full((2,), float(len(alive)))

    tensors = {name: Lazy(torch.float32, (2,), lambda name=name: make(name)) for name in "ba"}
    save_weights(tmp_path / "a.sft", tensors, {})
    assert alive == ["a", "b"]
    assert open_weights(tmp_path / "a.sft").tensor("b").tolist() == [2.0, 2.0]
    with pytest.raises(ModelFileError, match="announced as"):
        save_weights(tmp_path / "b.sft", {"x": Lazy(torch.float32, (3,), lambda: torch.zeros(2))}, {})
    assert not (tmp_path / "b.sft").exists()


def test_reading_keeps_one_tensor_in_memory(tmp_path: Path) -> None:
    class Quiet(Disk):
        """No fsync: this test is about memory."""

        def fsync(self, fd: int, path: Path) -> None:
            pass

    big = torch.zeros(8_000_000)  # 32 MB
    save_weights(tmp_path / "a.sft", {f"t{i}": big for i in range(10)}, {}, disk=Quiet())
    with open_weights(tmp_path / "a.sft") as weights:
        weights.tensor("t0")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(10):
            weights.tensor(f"t{i}")
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 80_000  # kB; the whole file is 320,000


def shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {f"t{i}": torch.full((2,), float(i)) for i in range(3)}
    for i, (name, tensor) in enumerate(tensors.items(), 1):
        save_weights(folder / f"model-0000{i}-of-00003.safetensors", {name: tensor}, {f"shard{i}": "x"})
    index = {"weight_map": {f"t{i}": f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("given", ["", "model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_shards_are_one_file(tmp_path: Path, given: str) -> None:
    tensors = shards(tmp_path)
    with open_weights(tmp_path / given) as weights:
        assert {name: weights.tensor(name).tolist() for name in weights} == {name: t.tolist() for name, t in tensors.items()}
        assert len(weights.metadata) == 3


@pytest.mark.parametrize("given", ["", "model-00003-of-00003.safetensors", "model.safetensors.index.json"])
def test_missing_shard_is_named(tmp_path: Path, given: str) -> None:
    shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelFileError, match="1 of 3 shards missing: model-00002-of-00003.safetensors"):
        open_weights(tmp_path / given)


def test_folder_without_index_and_with_two_models(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len(open_weights(tmp_path)) == 3
    save_weights(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ModelFileError, match="several models"):
        open_weights(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match="no .safetensors file"):
        open_weights(tmp_path / "empty")


def test_same_tensor_in_two_shards(tmp_path: Path) -> None:
    for i in (1, 2):
        save_weights(tmp_path / f"m-0000{i}-of-00002.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ModelFileError, match="is in m-00001-of-00002.safetensors too"):
        open_weights(tmp_path)


def test_index_cannot_leave_its_folder(tmp_path: Path) -> None:
    (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelFileError, match="outside its folder"):
        open_weights(tmp_path / "m.index.json")


def test_unknown_tensor_and_shrunk_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sft"
    save_weights(path, {"a": torch.zeros(100)}, {})
    weights = open_weights(path)
    with pytest.raises(ModelFileError, match="no tensor b"):
        weights.tensor("b")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelFileError, match="became shorter"):
        weights.tensor("a")
    with pytest.raises(ModelFileError, match="truncated"):
        read_header(path)


def test_unsupported_type_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="complex128"):
        save_weights(tmp_path / "a.sft", {"a": torch.zeros(1, dtype=torch.complex128)}, {})
    assert list(tmp_path.iterdir()) == []
