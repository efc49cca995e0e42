"""Files -> modules: find out what a file is, read sizes from its header, build on meta, stream the tensors in.

`load_dit("flux1-dev.safetensors", device="cuda", dtype=torch.bfloat16)`. A file in the wrong role is named as what it
is before anything is allocated; peak host memory is the size on the target plus the largest tensor.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fluxsmith.errors import ModelFileError
from fluxsmith.io.canonical import Source, canonical
from fluxsmith.io.identify import check_role, identify
from fluxsmith.io.identity import Identity
from fluxsmith.io.safetensors import WeightsFile
from fluxsmith.io.scaled import open_scaled
from fluxsmith.models.autoencoder import AutoEncoder, AutoEncoderParams
from fluxsmith.models.chroma import APPROXIMATOR, Chroma, ChromaParams
from fluxsmith.models.fill import ByBlock, check_keys, fill, fill_by_block, finish, meta, shapes_of
from fluxsmith.models.flux import FluxDiT, FluxParams
from fluxsmith.models.text_encoders import ClipParams, ClipText, T5EncoderModel, T5Params, T5Text
from fluxsmith.models.tiny_autoencoder import TinyAutoEncoder, TinyAutoEncoderParams

PathLike = str | Path
HINTS = "fluxsmith.model"  # metadata entry: numbers that tensors cannot tell, as JSON


class Opened(NamedTuple):
    """A file that plays a role: its tensors in our names, their shapes, and what else it says about itself."""

    tensors: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]
    identity: Identity
    hints: dict[str, Any]
    where: str


@contextmanager
def opened(path: PathLike, role: str) -> Iterator[Opened]:
    """Open a file for a role. Raises ModelFileError that names what the file is, if it is something else."""
    with open_scaled(path) as weights:
        identity = check_role(identify(weights), role, where=str(path))
        tensors = canonical(weights, identity, role)
        shapes = {key: source.shape for key, source in tensors.items()}
        yield Opened(tensors, shapes, identity, _hints(path, weights), str(path))


def load_dit(
    path: PathLike,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    axes_dim: Sequence[int] | None = None,
    by_block: ByBlock | None = None,
) -> FluxDiT:
    """The transformer, frozen and in eval mode. Raises ModelFileError for a wrong, incomplete or broken file.

    `by_block` changes (quantises) each block as soon as it is read.
    """
    with opened(path, "dit") as file:
        model = meta(lambda: build_dit(file.shapes, axes_dim or file.hints.get("axes_dim")))
        _stream(model, file.tensors, by_block, where=file.where, device=device, dtype=dtype)
    return model


def build_dit(shapes: Mapping[str, Sequence[int]], axes_dim: Sequence[int] | None = None) -> FluxDiT:
    """The transformer that these tensor shapes (BFL keys) belong to, with fresh weights: FLUX or Chroma."""
    if any(key.startswith(APPROXIMATOR) for key in shapes):
        return Chroma(ChromaParams.from_shapes(shapes, axes_dim))
    return FluxDiT(FluxParams.from_shapes(shapes, axes_dim))


def load_ae(path: PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> AutoEncoder | TinyAutoEncoder:
    """The autoencoder, of either form, frozen and in eval mode."""
    with opened(path, "ae") as file:
        model: AutoEncoder | TinyAutoEncoder
        if "decoder.layers.0.weight" in file.shapes:
            model = meta(lambda: TinyAutoEncoder(TinyAutoEncoderParams.from_shapes(file.shapes)))
        else:
            model = meta(lambda: AutoEncoder(AutoEncoderParams.from_shapes(file.shapes)))
        _stream(model, file.tensors, where=file.where, device=device, dtype=dtype)
    return model


def load_clip_l(path: PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ClipText:
    """CLIP-L's text tower from one file or a folder, frozen and in eval mode."""
    with opened(path, "clip_l") as file:
        params = ClipParams.from_shapes(file.shapes, file.hints.get("num_attention_heads"), file.hints.get("eos_token_id"))
        model = ClipText(params)  # its position buffer is computed at build time, so not on meta; 0.5 GB at most
        _stream(model.model, _renamed(file.tensors, ClipText), where=file.where, device=device, dtype=dtype)
    return model.to(device).eval()


def load_t5xxl(
    path: PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, by_block: ByBlock | None = None
) -> T5Text:
    """T5's encoder from one file (fp16, bf16 or fp8), shards, or a folder, frozen and in eval mode."""
    with opened(path, "t5xxl") as file:
        params = T5Params.from_shapes(file.shapes)
        model = meta(lambda: T5Text(params))
        _stream(model.model, _renamed(file.tensors, T5Text), by_block, where=file.where, device=device, dtype=dtype)
    return model.eval()


def _renamed(tensors: Mapping[str, Source], kind: type[ClipText] | type[T5Text]) -> dict[str, Source]:
    return {kind.memory_key(key): source for key, source in tensors.items()}


def _stream(
    model: nn.Module,
    tensors: Mapping[str, Source],
    by_block: ByBlock | None = None,
    *,
    where: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    expected = shapes_of(model)
    check_keys(expected, {key: source.shape for key, source in tensors.items()}, where)
    if by_block is None:
        fill(model, {key: tensors[key].read for key in expected}, device=device, dtype=dtype)
    else:
        fill_by_block(model, {key: tensors[key] for key in expected}, by_block, device=device, dtype=dtype)
    if isinstance(model, T5EncoderModel):
        model.encoder.embed_tokens.weight = model.shared.weight  # tied; a file holds it once
    finish(model)


def _hints(path: PathLike, weights: WeightsFile) -> dict[str, Any]:
    """From the file's own metadata, or from a config.json beside it (only whitelisted numbers)."""
    if HINTS in weights.metadata:
        return _hints_of(weights.metadata[HINTS], str(path))
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    config = folder / "config.json"
    if not config.is_file():
        return {}
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError("config.json cannot be read", where=str(config), why=str(error), fix="copy it again, or remove it") from error
    return {key: values[key] for key in ("num_attention_heads",) if isinstance(values.get(key), int)}


def _hints_of(text: str, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        what = f"its metadata entry {HINTS} cannot be read"
        raise ModelFileError(what, where=where, why=str(error), fix="use the original file") from error
