"""GGUF files are identified and read like others: plain and quantised forms, T5's llama.cpp names, damaged headers, a missing package."""

import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxsmith.errors import ModelFileError
from fluxsmith.io import gguf_header
from fluxsmith.io.gguf_header import KINDS, T5_LAYERS
from fluxsmith.io.header import read_header
from fluxsmith.io.identify import identify
from fluxsmith.io.safetensors import open_weights
from fluxsmith.io.scaled import open_scaled
from fluxsmith.models.load import load_dit, load_t5xxl

Q8 = GGMLQuantizationType.Q8_0


def written(
    path: Path, tensors: Mapping[str, torch.Tensor], kind: GGMLQuantizationType = Q8, arch: str = "flux"
) -> dict[str, torch.Tensor]:
    """A file as ComfyUI-GGUF writes them: matrices quantised where their rows fit, the rest plain. Returns what it stands for."""
    writer = GGUFWriter(str(path), arch)
    writer.add_string("general.name", "tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0, 2.0])
    stands: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % GGML_QUANT_SIZES[kind][0] == 0:
            stored = quantize(values, kind)
            writer.add_tensor(name, stored, raw_dtype=kind)
            stands[name] = torch.from_numpy(dequantize(stored, kind).copy())
        else:
            writer.add_tensor(name, values)
            stands[name] = torch.from_numpy(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with open_weights(path) as weights:
        return {name: weights.tensor(name) for name in weights}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16"])
def test_transformer(tmp_path: Path, fixtures_root: Path, kind: str) -> None:
    original = tensors_of(fixtures_root / "flux-dev-tiny/weights.safetensors")
    path = tmp_path / "flux1-dev.gguf"
    stands = written(path, original, GGMLQuantizationType[kind])
    found = identify(path)
    assert (found.role, found.variant, found.key_style, found.problems) == ("dit", "dev", "bfl", ())
    if kind.startswith("Q"):
        assert any(f"weights are stored in {kind}" in note for note in found.notes)
    model = load_dit(path, axes_dim=(4, 4, 4))
    loaded = dict(model.named_parameters())
    assert loaded.keys() == stands.keys()
    assert all(torch.equal(loaded[name], stands[name]) for name in stands)
    assert load_dit(path, axes_dim=(4, 4, 4), dtype=torch.bfloat16).img_in.weight.dtype == torch.bfloat16


def test_t5_in_llama_cpps_names(tmp_path: Path, fixtures_root: Path) -> None:
    original = tensors_of(fixtures_root / "t5-tiny/weights.safetensors")
    short = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}
    layers = {long: name for name, long in T5_LAYERS.items()}
    renamed = {}
    for name, tensor in original.items():
        _, _, block, rest = name.split(".", 3) if "block" in name else ("", "", "", "")
        key = f"enc.blk.{block}.{layers[rest.removesuffix('.weight')]}.weight" if rest else short.get(name)
        renamed |= {key: tensor} if key else {}
    stands = written(tmp_path / "t5.gguf", renamed, arch="t5encoder")
    assert identify(tmp_path / "t5.gguf").role == "t5xxl"
    model = load_t5xxl(tmp_path / "t5.gguf")
    assert torch.equal(model.model.shared.weight, stands["token_embd.weight"])
    key = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
    assert torch.equal(dict(model.model.named_parameters())[key], stands["enc.blk.0.ffn_up.weight"])


def test_metadata_and_order_of_sides(tmp_path: Path) -> None:
    written(tmp_path / "a.gguf", {"x": torch.arange(6.0).view(2, 3)})
    header = read_header(tmp_path / "a.gguf")
    assert header.metadata == {"general.architecture": "flux", "general.name": "tiny"}
    assert (header.tensors["x"].shape, header.tensors["x"].dtype) == ((2, 3), "F32")
    (tmp_path / "a.gguf").rename(tmp_path / "a.safetensors")  # named wrong, read right
    with open_weights(tmp_path / "a.safetensors") as weights:
        assert torch.equal(weights.tensor("x"), torch.arange(6.0).view(2, 3))


def test_sizes_of_blocks_are_those_of_the_package() -> None:
    for number, (name, values, size) in KINDS.items():
        assert (GGMLQuantizationType[name], GGML_QUANT_SIZES[GGMLQuantizationType(number)]) == (number, (values, size))


@pytest.mark.parametrize("name", list(gguf_header.QUANTISED))
def test_every_quantised_form_is_understood(tmp_path: Path, name: str) -> None:
    """Forms that the package cannot write too: random bytes stand for what it says they do."""
    kind = GGMLQuantizationType[name]
    values, size = GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (40, size), dtype=np.uint8)
    writer = GGUFWriter(str(tmp_path / "a.gguf"), "flux")
    writer.add_tensor("x.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_scaled(tmp_path / "a.gguf") as weights:
        assert weights.infos["x.weight"].shape == (40, values)
        with np.errstate(all="ignore"):
            found = weights.tensor("x.weight")
    with np.errstate(all="ignore"):  # random scales may be no numbers
        assert np.array_equal(found.numpy(), dequantize(stored, kind).reshape(40, values), equal_nan=True)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual forms need none."""
    written(tmp_path / "a.gguf", {"x.weight": torch.ones(2, 32)})
    kind = GGMLQuantizationType.IQ4_NL
    writer = GGUFWriter(str(tmp_path / "b.gguf"), "flux")
    writer.add_tensor("x.weight", np.ones((2, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        monkeypatch.setitem(sys.modules, name, None)
    with open_scaled(tmp_path / "a.gguf") as weights:
        assert torch.allclose(weights.tensor("x.weight"), torch.ones(2, 32), atol=1e-3)
    with open_scaled(tmp_path / "b.gguf") as weights, pytest.raises(ModelFileError, match=r"need the gguf package.*pip install gguf"):
        weights.tensor("x.weight")


def head(count: int, pairs: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, pairs) + rest


def tensor(name: bytes, sides: tuple[int, ...], kind: int, start: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, start)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "no magic": (b"x" * 100, "does not begin"),
    "version": (head(0, 0, version=9), "version 9"),
    "short": (b"GGUF\3\0", "ends inside"),
    "tensors": (head(1 << 40, 0), "too many"),
    "name": (head(1, 0, struct.pack("<Q", 1 << 50)), "name of"),
    "kind": (head(1, 0, tensor(b"a", (4,), 77, 0) + bytes(64)), "not known"),
    "beyond": (head(1, 0, tensor(b"a", (1 << 20,), 0, 0) + bytes(64)), "outside of the file"),
    "over": (head(2, 0, tensor(b"a", (16,), 0, 0) + tensor(b"b", (8,), 0, 32) + bytes(128)), "over another"),
    "rows": (head(1, 0, tensor(b"a", (33, 2), 8, 0) + bytes(128)), "cannot hold"),
    "sides": (head(1, 0, tensor(b"a", (1,) * 9, 0, 0) + bytes(64)), "sides"),
    "twice": (head(2, 0, tensor(b"a", (8,), 0, 0) + tensor(b"a", (8,), 0, 32) + bytes(128)), "twice"),
    "row of rows": (head(0, 1, struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 9, 1 << 40)), "unknown kind"),
    "long row": (head(0, 1, struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 1 << 60)), "ends inside"),
    "alignment": (head(0, 1, struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 12)), "alignment"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_headers(tmp_path: Path, name: str) -> None:
    content, why = DAMAGED[name]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match=why):
        read_header(tmp_path / "a.gguf")


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_ends_in_one_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.gguf"
    if not path.exists():
        written(path, {"x.weight": torch.ones(2, 32), "y": torch.ones(2)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "b.gguf").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read_header(tmp_path / "b.gguf")
    except ModelFileError as error:
        assert "b.gguf" in str(error)  # noqa: PT017  both outcomes are right


def test_reading_makes_no_copy_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is read and dequantised on its own."""
    written(tmp_path / "a.gguf", {f"x{i}.weight": torch.ones(4, 32) for i in range(5)})
    with open_scaled(tmp_path / "a.gguf") as weights:
        sizes: list[int] = []
        original: Callable[..., object] = weights._read
        monkeypatch.setattr(weights, "_read", lambda name, info: sizes.append(info.size) or original(name, info))
        weights.tensor("x3.weight")
        assert sizes == [4 * 34]
