"""What is written into files about how they were made: ss_* (as sd-scripts), modelspec 1.0.1, PNG text. All values are strings.

`with_hashes(tensors, training_metadata(facts, spec))` is the metadata of an adapter file.
"""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import fluxsmith
from fluxsmith.errors import DataError
from fluxsmith.io.safetensors import header_bytes, layout_order, tensor_bytes

LEGACY_OFFSET, LEGACY_LENGTH = 0x100000, 0x10000  # the window that AUTOMATIC1111's first hash looks at
MINIMAL_KEYS = ("v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args")
BFL_REPOSITORY = "https://github.com/black-forest-labs/flux"
CHROMA_REPOSITORY = "https://huggingface.co/lodestones/Chroma"
ARCHITECTURES = {"schnell": "flux-1-schnell", "chroma": "chroma"}
DEV_STRUCTURE = ("dev", "krea", "kontext", "fill", "canny", "depth", "canny-depth", "flux-shapes")
OPTION_DEFAULTS: Mapping[str, Any] = {  # sd-scripts writes all of these, also those without effect on FLUX
    "sd_scripts_commit_hash": None, "lowram": False, "clip_skip": None, "max_token_length": None, "full_fp16": False,
    "fp8_base": False, "fp8_base_unet": False, "noise_offset": None, "noise_offset_random_strength": False,
    "multires_noise_iterations": None, "multires_noise_discount": 0.3, "adaptive_noise_scale": None, "zero_terminal_snr": False,
    "ip_noise_gamma": None, "ip_noise_gamma_random_strength": False, "caption_dropout_rate": 0.0,
    "caption_dropout_every_n_epochs": 0, "caption_tag_dropout_rate": 0.0, "face_crop_aug_range": None, "resize_interpolation": None,
    "prior_loss_weight": 1.0, "min_snr_gamma": None, "debiased_estimation": False, "loss_type": "l2", "huber_schedule": "snr",
    "huber_scale": 1.0, "huber_c": 0.1, "scale_weight_norms": None, "validation_seed": None, "validation_split": 0.0,
    "max_validation_steps": None, "validate_every_n_epochs": None, "validate_every_n_steps": None, "model_type": "flux",
    "apply_t5_attn_mask": False, "weighting_scheme": "uniform", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29,
    "guidance_scale": 1.0, "timestep_sampling": "flux_shift", "sigmoid_scale": 1.0, "model_prediction_type": "raw",
    "discrete_flow_shift": 3.0, "cache_latents": True, "gradient_checkpointing": False,
}  # fmt: skip


@dataclass(frozen=True)
class TrainingFacts:
    """What a training run says about itself. Names without a unit are counts."""

    output_name: str
    """Name of the weights file without ending."""
    session_id: str
    """The run's random id."""
    started_at: float
    """Unix time, seconds."""
    finished_at: float | None = None
    """Unix time, seconds; None for files written along the way."""
    comment: str = ""
    """Free text."""
    base_model_version: str = "flux1"
    """flux1 or chroma: what other tools filter adapters by."""
    adapter_module: str = "networks.lora_flux"
    """The module that sd-scripts would have used: it tells other tools the kind of adapter."""
    rank: int | str = "Dynamic"
    """Rank of all layers, or Dynamic."""
    alpha: float | str = "Dynamic"
    """Alpha of all layers, or Dynamic."""
    dropout: float | None = None
    """Dropout on the rank activations."""
    adapter_args: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the adapter (targets, init, dropouts)."""
    learning_rate: float | None = None
    """Base learning rate."""
    dit_lr: float | None = None
    """Rate of the transformer's layers, if it differs."""
    text_encoder_lr: Sequence[float] | float | None = None
    """Rate of the text encoders' layers."""
    optimizer: str = ""
    """Class path, with its arguments in brackets."""
    lr_scheduler: str = "constant"
    """Schedule name."""
    lr_warmup_steps: float = 0
    """Steps of warm-up."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 is off."""
    num_train_images: int = 0
    """Pictures times repeats."""
    num_validation_images: int = 0
    """Pictures held out."""
    num_reg_images: int = 0
    """Regularisation pictures."""
    num_batches_per_epoch: int = 0
    """Micro-batches."""
    num_epochs: int = 0
    """Epochs of the whole run."""
    epoch: int = 0
    """Epoch of this file."""
    max_train_steps: int = 0
    """Optimizer steps of the whole run."""
    steps: int = 0
    """Optimizer steps of this file."""
    accumulation: int = 1
    """Micro-batches in one optimizer step."""
    mixed_precision: str = "no"
    """no, fp16 or bf16."""
    seed: int = 0
    """Seed of every draw."""
    dit_file: Path | None = None
    """Transformer file; its name and short hash are written, never its folder (the full SHA-256 goes into `options`)."""
    ae_file: Path | None = None
    """Autoencoder file, in the same way."""
    datasets: Sequence[Mapping[str, Any]] = ()
    """One entry a dataset, in sd-scripts' form (image counts, resolution, buckets, subsets)."""
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Folder name -> lower-cased tag -> count. Left out of minimal metadata, like all folder names."""
    dataset_dirs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Folder name -> {"n_repeats", "img_count"}."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Any other ss_ value by its name without `ss_` (see OPTION_DEFAULTS for what is written anyway)."""


@dataclass(frozen=True)
class ModelSpec:
    """The modelspec block (version 1.0.1); empty texts are left out."""

    title: str
    """Name shown to users."""
    variant: str = "dev"
    """dev, schnell, krea, kontext, chroma, ...: which base it is for."""
    adapter: str = "lora"
    """Kind of adapter; empty for a whole model."""
    resolution: tuple[int, int] = (1024, 1024)
    """Width and height trained at, pixels."""
    date: float | None = None
    """Unix time; None is now."""
    author: str = ""
    description: str = ""
    license: str = ""
    tags: str = ""
    usage_hint: str = ""
    trigger_phrase: str = ""
    thumbnail: str = ""
    merged_from: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Any other entry by its name without `modelspec.`; a thumbnail that is a file becomes a data URL."""
    timestep_range: tuple[int, int] | None = None
    """Lowest and highest timestep trained, 0..1000, if limited."""


def training_metadata(facts: TrainingFacts, spec: ModelSpec, *, minimal: bool = False) -> dict[str, str]:
    """The ss_* and modelspec entries. `minimal` leaves out captions, folder names, rates and settings."""
    values = _facts_values(facts) | dict(facts.options)
    if minimal:
        values = {key: values[key] for key in MINIMAL_KEYS if key in values}
    return {f"ss_{key}": _text(value) for key, value in values.items()} | modelspec(spec)


def _facts_values(facts: TrainingFacts) -> dict[str, Any]:
    direct = {
        name: getattr(facts, name)
        for name in (
            "output_name", "session_id", "base_model_version", "learning_rate", "text_encoder_lr", "optimizer", "lr_scheduler",
            "lr_warmup_steps", "max_grad_norm", "num_train_images", "num_validation_images", "num_reg_images",
            "num_batches_per_epoch", "num_epochs", "epoch", "max_train_steps", "steps", "mixed_precision", "seed",
        )
    }  # fmt: skip
    values = dict(OPTION_DEFAULTS) | direct
    values |= {
        "training_started_at": facts.started_at,
        "training_finished_at": facts.finished_at,
        "training_comment": facts.comment,
        "unet_lr": facts.dit_lr,
        "network_module": facts.adapter_module,
        "network_dim": facts.rank,
        "network_alpha": facts.alpha,
        "network_dropout": facts.dropout,
        "gradient_accumulation_steps": facts.accumulation,
        "v2": False,
    }
    if facts.adapter_args:
        values["network_args"] = dict(facts.adapter_args)
    for prefix, file in (("sd_model", facts.dit_file), ("vae", facts.ae_file)):
        if file is not None:
            values[f"{prefix}_name"] = file.name
            if file.is_file():
                values[f"{prefix}_hash"] = legacy_file_hash(file)
    if facts.datasets:
        values |= {"datasets": list(facts.datasets), "tag_frequency": dict(facts.tag_frequency), "dataset_dirs": dict(facts.dataset_dirs)}
    return values


def modelspec(spec: ModelSpec) -> dict[str, str]:
    """The modelspec.* entries."""
    base = ARCHITECTURES.get(spec.variant, "flux-1-dev" if spec.variant in DEV_STRUCTURE else "flux-1")
    moment = time.localtime(spec.date) if spec.date is not None else time.localtime()
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{base}/{spec.adapter}" if spec.adapter else base,
        "implementation": CHROMA_REPOSITORY if base == "chroma" else BFL_REPOSITORY,
        "implementation_version": f"fluxsmith/{fluxsmith.__version__}",
        "title": spec.title,
        "resolution": f"{spec.resolution[0]}x{spec.resolution[1]}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", moment),
        "timestep_range": f"{spec.timestep_range[0]},{spec.timestep_range[1]}" if spec.timestep_range else "",
    }
    texts = ("author", "description", "license", "tags", "usage_hint", "trigger_phrase", "thumbnail", "merged_from")
    values |= {name: getattr(spec, name) for name in texts}
    values |= {key: data_url(value) if key == "thumbnail" else value for key, value in spec.extra.items()}
    return {f"modelspec.{key}": value for key, value in values.items() if value}


def data_url(picture: str) -> str:
    """A picture file as a data URL; anything else stays as it is. Raises DataError for a file that is no picture."""
    path = Path(picture)
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if picture.startswith("data:") or path.suffix.lower() not in kinds:
        return picture
    try:
        return f"data:image/{kinds[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise DataError("the thumbnail cannot be read", where=picture, why=error.strerror or "", fix="name a PNG, JPEG or WebP") from None


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with sshs_model_hash and sshs_legacy_hash, by which web UIs know an adapter again.

    The first is SHA-256 of all tensor bytes; the second looks at 64 KiB at 1 MiB of the file as it would be with ss_ entries only.
    """
    names = layout_order(tensors)
    ordered = {name: tensors[name] for name in names}
    head = header_bytes(ordered, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    whole, window, place = hashlib.sha256(), hashlib.sha256(_window(memoryview(head), 0)), len(head)
    for tensor in ordered.values():
        data = memoryview(tensor_bytes(tensor)).cast("B")
        whole.update(data)
        window.update(_window(data, place))
        place += len(data)
    return {**metadata, "sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:8]}


def _window(data: memoryview, place: int) -> memoryview:
    """The part of `data` (at `place` in the file) that lies in the legacy window."""
    return data[max(0, LEGACY_OFFSET - place) : max(0, LEGACY_OFFSET + LEGACY_LENGTH - place)]


def legacy_file_hash(path: Path) -> str:
    """ss_sd_model_hash and ss_vae_hash: 8 hex digits of 64 KiB at 1 MiB of a file."""
    with path.open("rb") as file:
        file.seek(LEGACY_OFFSET)
        return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]


def png_text(settings: Mapping[str, Any], *, model: str = "") -> dict[str, str]:
    """PNG entries of a generated picture: `parameters` as web UIs read it, and `fluxsmith` with everything as JSON."""
    fields = {
        "Steps": settings.get("steps"),
        "Sampler": str(settings["sampler"]).capitalize() if settings.get("sampler") else None,
        "CFG scale": settings.get("cfg"),
        "Distilled CFG Scale": settings.get("guidance"),
        "Seed": settings.get("seed"),
        "Size": f"{settings['width']}x{settings['height']}" if "width" in settings and "height" in settings else None,
        "Denoising strength": settings.get("strength") if settings.get("image_to_image") else None,
        "Step cache": _step_cache(settings),
        "Model": model or None,
        "Version": f"fluxsmith {fluxsmith.__version__}",
    }
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative"):
        lines.append(f"Negative prompt: {settings['negative']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None))
    record = {**settings, "model": model, "version": fluxsmith.__version__}
    return {"parameters": "\n".join(lines), "fluxsmith": json.dumps(record, ensure_ascii=False, sort_keys=True, default=str)}


def _step_cache(settings: Mapping[str, Any]) -> str | None:
    cache = settings.get("cache")
    if not cache:
        return None
    return f"{cache['type']} {cache['threshold']} (skipped {settings.get('forwards_skipped', 0)} of {settings.get('forwards', 0)})"


def _text(value: Any) -> str:
    """sd-scripts' way: JSON for tables and lists of tables, `str` for the rest."""
    if isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
        return json.dumps(value)
    return str(value)
