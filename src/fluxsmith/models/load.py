"""Files -> modules: find out what a file is, read sizes from its header, build on meta, stream the tensors in.

`load_dit("flux1-dev.safetensors", device="cuda", dtype=torch.bfloat16)`. A file in the wrong role is named as what it
is before anything is allocated.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxsmith.errors import ModelFileError
from fluxsmith.io.safetensors import WeightsFile, open_weights
from fluxsmith.models.autoencoder import AutoEncoder, AutoEncoderParams
from fluxsmith.models.fill import Source, check_keys, fill, finish, meta, shapes_of
from fluxsmith.models.flux import FluxDiT, FluxParams
from fluxsmith.models.text_encoders import ClipParams, ClipText, T5EncoderModel, T5Params, T5Text
from fluxsmith.models.tiny_autoencoder import TinyAutoEncoder, TinyAutoEncoderParams

PathLike = str | Path
CLIP_EXTRAS = ("text_model.embeddings.position_ids", "text_projection.weight", "logit_scale")  # in some files; FLUX uses none of them


def load_dit(
    path: PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, axes_dim: Sequence[int] | None = None
) -> FluxDiT:
    """The transformer, frozen and in eval mode. Raises ModelFileError for a wrong, incomplete or broken file."""
    with open_weights(path) as weights:
        tensors = {key: (info.shape, _reader(weights, key)) for key, info in weights.infos.items()}
        params = FluxParams.from_shapes({key: shape for key, (shape, _) in tensors.items()}, axes_dim)
        model = meta(lambda: FluxDiT(params))
        assert isinstance(model, FluxDiT)
        _stream(model, tensors, where=str(path), device=device, dtype=dtype)
        return model


def load_ae(
    path: PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> AutoEncoder | TinyAutoEncoder:
    """The autoencoder, of either form, frozen and in eval mode."""
    with open_weights(path) as weights:
        tensors = {key: (info.shape, _reader(weights, key)) for key, info in weights.infos.items()}
        shapes = {key: shape for key, (shape, _) in tensors.items()}
        tiny = "decoder.layers.0.weight" in shapes
        build: Callable[[], nn.Module] = (
            (lambda: TinyAutoEncoder(TinyAutoEncoderParams.from_shapes(shapes)))
            if tiny
            else (lambda: AutoEncoder(AutoEncoderParams.from_shapes(shapes)))
        )
        model = meta(build)
        _stream(model, tensors, where=str(path), device=device, dtype=dtype)
        assert isinstance(model, AutoEncoder | TinyAutoEncoder)
        return model


def load_clip_l(path: PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ClipText:
    """CLIP-L's text tower from one file or a folder."""
    with open_weights(path) as weights:
        tensors = {key: (info.shape, _reader(weights, key)) for key, info in weights.infos.items() if key not in CLIP_EXTRAS}
        hints = _hints(path, weights)
        shapes = {key: shape for key, (shape, _) in tensors.items()}
        params = ClipParams.from_shapes(shapes, hints.get("num_attention_heads"), hints.get("eos_token_id"))
        model = ClipText(params)  # tiny buffers are computed at build time, so not on meta
        renamed = {ClipText.memory_key(key): value for key, value in tensors.items()}
        _stream(model.model, renamed, where=str(path), device=device, dtype=dtype)
        return model.to(device).eval()


def load_t5xxl(path: PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> T5Text:
    """T5's encoder from one file (fp16, bf16 or fp8), shards, or a folder."""
    with open_weights(path) as weights:
        tensors = {key: (info.shape, _reader(weights, key)) for key, info in weights.infos.items()}
        params = T5Params.from_shapes({key: shape for key, (shape, _) in tensors.items()})
        model = meta(lambda: T5Text(params))
        assert isinstance(model, T5Text)
        renamed = {T5Text.memory_key(key): value for key, value in tensors.items()}
        _stream(model.model, renamed, where=str(path), device=device, dtype=dtype)
        return model.eval()


def _stream(
    model: nn.Module,
    tensors: Mapping[str, tuple[Sequence[int], Source]],
    *,
    where: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    check_keys(shapes_of(model), {key: shape for key, (shape, _) in tensors.items()}, where)
    fill(model, {key: source for key, (_, source) in tensors.items()}, device=device, dtype=dtype)
    if isinstance(model, T5EncoderModel):
        model.encoder.embed_tokens.weight = model.shared.weight  # tied; a file holds it once
    finish(model)


def _reader(weights: WeightsFile, key: str) -> Source:
    def read() -> Tensor:
        return weights.tensor(key)

    return read


def _hints(path: PathLike, weights: WeightsFile) -> dict[str, Any]:
    """Numbers that tensors cannot tell: from the file's own metadata, or a config.json beside it."""
    if "fluxsmith.model" in weights.metadata:
        return json.loads(weights.metadata["fluxsmith.model"])
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    config = folder / "config.json"
    if not config.is_file():
        return {}
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError("config.json cannot be read", where=str(config), why=str(error), fix="copy it again, or remove it") from error
    return {key: values[key] for key in ("num_attention_heads",) if isinstance(values.get(key), int)}
