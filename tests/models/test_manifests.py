"""Every published file: its header alone is identified and goes through its real loader, nothing missing, unexpected, misshapen or unread.

Nothing is read or allocated: the loaders run on tensors that have a shape and no values.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from header_files import header_only
from torch import Tensor, nn

from fluxsmith.adapters.fusion import load_fusion
from fluxsmith.controls.controlnet_model import load_controlnet
from fluxsmith.controls.infiniteyou_model import load_face_projector
from fluxsmith.controls.ip_adapter_model import load_ip_adapter
from fluxsmith.controls.lora_encoder_model import load_lora_encoder
from fluxsmith.controls.nexus_gen_model import load_adapter, load_merger
from fluxsmith.controls.redux_model import load_redux
from fluxsmith.controls.step1x_model import load_connector
from fluxsmith.controls.value_model import load_value_encoder
from fluxsmith.errors import ModelFileError
from fluxsmith.io.safetensors import TORCH_DTYPES, WeightsFile
from fluxsmith.models.load import load_ae, load_clip_l, load_dit, load_t5xxl
from fluxsmith.models.qwen_vl import load_qwen
from fluxsmith.models.vision_encoders import load_siglip

Loader = Callable[..., nn.Module]
LOADERS: dict[str, tuple[tuple[Loader, ...], str]] = {  # manifest -> loaders, and what of the file none of them has a use for
    "ae": ((load_ae,), ""),
    "attrictrl-value-encoder": ((load_value_encoder,), ""),
    "chroma": ((load_dit,), ""),
    "clip_l": ((load_clip_l,), ""),
    "controlnet-inpainting-beta": ((load_controlnet,), ""),
    "controlnet-union-alpha": ((load_controlnet,), ""),
    "controlnet-upscaler": ((load_controlnet,), ""),
    "flex2-preview": ((load_dit,), ""),
    "flux1-canny-dev": ((load_dit,), ""),
    "flux1-dev-aio-prefixed": ((load_dit,), ""),
    "flux1-dev-diffsynth-native": ((load_dit,), ""),
    "flux1-dev-diffusers-transformer": ((load_dit,), ""),
    "flux1-dev": ((load_dit,), ""),
    "flux1-fill-dev": ((load_dit,), ""),
    "flux1-kontext-dev": ((load_dit,), ""),
    "flux1-krea-dev": ((load_dit,), ""),
    "flux1-schnell": ((load_dit,), ""),
    "infiniteyou-image-proj": ((load_face_projector,), ""),
    "infiniteyou-infusenet": ((load_controlnet,), ""),
    "ip-adapter": ((load_ip_adapter,), ""),
    "lora-encoder": ((load_lora_encoder,), ""),
    "lora-fusion-patcher": ((load_fusion,), ""),
    "nexus-gen-v2-ar": ((load_qwen,), r"lm_head\.weight"),
    "nexus-gen-v2-edit-decoder": ((load_dit, load_merger), ""),
    "nexus-gen-v2-generation-decoder": ((load_dit, load_adapter), ""),
    "qwen2.5-vl-7b-instruct": ((load_qwen,), r"lm_head\.weight"),
    "redux-image-embedder": ((load_redux,), ""),
    "redux-siglip-image-encoder": ((load_siglip,), ""),
    "siglip-so400m-patch14-384": ((load_siglip,), r"text_model\..*|logit_(scale|bias)"),
    "step1x-edit": ((load_dit, load_connector), ""),
    "t5xxl": ((load_t5xxl,), ""),
}


def test_every_manifest_has_its_loader(manifests_root: Path) -> None:
    names = {path.stem for path in manifests_root.glob("*.json")}
    assert names == LOADERS.keys()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of all tensors that are read from now on, each given as a shape without values, which loaders take for filled."""
    names: set[str] = set()

    def tensor(self: WeightsFile, name: str, *, dtype: torch.dtype | None = None, device: Any = "cpu") -> Tensor:
        names.add(name)
        return torch.empty(self.infos[name].shape, dtype=dtype or TORCH_DTYPES[self.infos[name].dtype], device="meta")

    monkeypatch.setattr(WeightsFile, "tensor", tensor)
    monkeypatch.setattr(nn.Module, "state_dict", lambda self: {})
    return names


def shapes_of(root: Path, name: str) -> dict[str, list[int]]:
    return json.loads((root / f"{name}.json").read_text())["tensors"]


@pytest.mark.ledger("FS-06")
@pytest.mark.parametrize("name", LOADERS)
def test_published_file_fits_its_model(tmp_path: Path, manifests_root: Path, read: set[str], name: str) -> None:
    loaders, unused = LOADERS[name]
    shapes = shapes_of(manifests_root, name)
    path = header_only(tmp_path / "m.safetensors", shapes)
    with torch.device("meta"):
        for load in loaders:
            assert {tensor.dtype for tensor in load(path, device="meta", dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {key for key in shapes if key not in read} == {key for key in shapes if unused and re.fullmatch(unused, key)}


@pytest.mark.parametrize("name", ["redux-image-embedder", "controlnet-upscaler", "infiniteyou-infusenet", "ae"])
@pytest.mark.parametrize("how", ["missing", "misshapen"])
def test_the_check_can_fail(tmp_path: Path, manifests_root: Path, read: set[str], name: str, how: str) -> None:
    shapes = shapes_of(manifests_root, name)
    last = [key for key in shapes if key.endswith("bias")][-1]
    if how == "missing":
        del shapes[last]
    else:
        shapes[last] = [side + 1 for side in shapes[last]]
    path = header_only(tmp_path / "m.safetensors", shapes)
    with torch.device("meta"), pytest.raises(ModelFileError):
        LOADERS[name][0][0](path, device="meta")
