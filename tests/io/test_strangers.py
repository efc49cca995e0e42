"""Whatever bytes or key names a file has, the outcome is success or ModelFileError; nothing else, and nothing large."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxsmith.errors import ModelFileError
from fluxsmith.io.header import Header, TensorInfo, read_header
from fluxsmith.io.identify import identify

QUICK = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.sampled_from(
    re.findall(
        r"\S+",
        """double_blocks single_blocks transformer_blocks img_attn qkv weight bias lora_down lora_A 0 1 99 text_model encoder layers block
        layer SelfAttention q decoder conv_in vae. model.diffusion_model. controlnet_blocks ip_adapter to_k_ip alpha scale_weight shared""",
    )
)
NAMES = st.lists(WORDS, min_size=1, max_size=6).map(".".join)
SHAPES = st.lists(st.integers(0, 200), max_size=4).map(tuple)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


def read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ModelFileError as error:
        assert str(path) in str(error)  # noqa: PT017  both outcomes are right
    else:
        assert sum(info.size for info in header.tensors.values()) + header.data_offset == len(content)


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    read(tmp_path / "a", content)


@QUICK
@given(JSON, st.binary(max_size=16))
def test_any_json(tmp_path: Path, value: object, data: bytes) -> None:
    text = json.dumps(value).encode()
    read(tmp_path / "a", len(text).to_bytes(8, "little") + text + data)


@QUICK
@given(
    st.dictionaries(
        st.text(max_size=6),
        st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "U8", "F4", "X"]), "shape": JSON, "data_offsets": JSON}),
        max_size=3,
    ),
    st.binary(max_size=16),
)
def test_any_entries(tmp_path: Path, entries: dict[str, object], data: bytes) -> None:
    text = json.dumps(entries).encode()
    read(tmp_path / "a", len(text).to_bytes(8, "little") + text + data)


@QUICK
@given(st.data())
def test_damaged_files(tmp_path: Path, fixtures_root: Path, data: st.DataObject) -> None:
    content = bytearray((fixtures_root / "redux-tiny/weights.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    read(tmp_path / "a", bytes(content[: data.draw(st.integers(0, len(content)))]))


@QUICK
@given(st.dictionaries(NAMES, SHAPES, max_size=12))
def test_any_key_set_is_identified_as_something(shapes: dict[str, tuple[int, ...]]) -> None:
    found = identify(Header(Path("a.safetensors"), {name: TensorInfo("F32", shape, 0, 0) for name, shape in shapes.items()}))
    assert found.describe()
    json.dumps(found.as_record())


@pytest.mark.parametrize(
    "name", ["flux-dev-tiny/weights", "t5-tiny/weights", "flux-dev-lora-tiny/kohya", "ae-tiny/weights", "clip_l-tiny/weights"]
)
def test_a_key_less_is_never_a_crash(fixtures_root: Path, name: str) -> None:
    header = read_header(fixtures_root / f"{name}.safetensors")
    for key in header.tensors:
        found = identify(Header(header.path, {other: info for other, info in header.tensors.items() if other != key}))
        assert found.is_known
        assert found.describe()
