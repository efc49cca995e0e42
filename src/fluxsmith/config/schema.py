"""The whole run as types: fixed sections here, pluggable ones found by file name (`config/choice.py`).

Read a file with `fluxsmith.config.load.load_config("run.toml", ["train.steps=500"])`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from fluxsmith.config.choice import Choice
from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.config.distributed import DistributedConfig
from fluxsmith.config.foreign import check_allowed
from fluxsmith.config.memory import MemoryConfig
from fluxsmith.config.section import PluginConfig, Section

Component = Literal["dit", "clip_l", "t5xxl", "ae"]
Dtype = Literal["fp32", "bf16", "fp16"]


class ScheduleConfig(Section):
    """Learning rate over steps, as a factor on `optim.lr`. Steps are optimizer steps, however many processes there are."""

    name: Literal[
        "constant",
        "linear",
        "cosine",
        "cosine_restarts",
        "polynomial",
        "piecewise_constant",
        "inverse_sqrt",
        "warmup_stable_decay",
        "imported",
    ] = "constant"
    """Shape after the warm-up."""
    warmup: NonNegativeFloat = 0
    """Steps of linear warm-up; below 1, or with a percent sign, it is a share of the run."""
    warmup_from: Literal["first", "zero"] = "first"
    """Rate of the first warm-up step: that of the first rung, so that no step is lost, or zero, as in transformers."""
    decay: NonNegativeFloat = 0
    """Steps of decay at the end (warmup_stable_decay), a tenth of the run by default; below 1, or with a percent sign, a share."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """How warmup_stable_decay decays."""
    cycles: PositiveFloat = 1
    """Cosine periods (cosine: half-cosines, as in the decay of warmup_stable_decay; cosine_restarts: hard restarts)."""
    power: PositiveFloat = 1.0
    """Exponent of the polynomial schedule."""
    timescale: PositiveFloat | None = None
    """inverse_sqrt: steps after which the rate has fallen to 1 / sqrt 2; the warm-up by default, or 10,000."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Lowest factor that a decay reaches."""
    rules: str = ""
    """piecewise_constant: `factor:until_step,...,last_factor`, for example `1:500,0.5:800,0.1`."""
    path: str = Field(default="", validation_alias=AliasChoices("path", "class"))
    """imported: a class of torch.optim.lr_scheduler (`CosineAnnealingLR`), or the dotted path of another one that --plugin allows."""
    options: dict[str, bool | int | float | str | tuple[float, ...] | None] = {}
    """imported: arguments of the class, for example `{ T_max = 500, eta_min = 1e-6 }`; rates in them are absolute."""

    @field_validator("warmup", "decay", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        if not isinstance(value, str) or not value.strip().endswith("%"):
            return value
        share = float(value.strip().removesuffix("%")) / 100
        if not 0 <= share < 1:
            raise ValueError("a share of the run is below 100%")
        return share

    @field_validator("path")
    @classmethod
    def _is_allowed(cls, value: str, info: ValidationInfo) -> str:
        full = f"torch.optim.lr_scheduler.{value}" if value.isidentifier() else value
        return check_allowed(full, info) if value else ""


class NoiseConfig(Section):
    """Which noise level each sample is trained at, and what the model predicts."""

    sampling: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift", "beta", "custom"] = "flux_shift"
    """Distribution of the noise level; flux_shift depends on the picture's size as inference does."""
    sigmoid_scale: PositiveFloat = 1.0
    """Factor on the normal draw before the sigmoid (sigmoid, shift, flux_shift)."""
    shift: PositiveFloat = 3.0
    """Shift of `sigma` and `shift`: s' = shift s / (1 + (shift - 1) s)."""
    auto_shift: bool = False
    """Compute the shift from the picture's size (as flux_shift) for `uniform`, `sigmoid`, `shift` and `beta`."""
    beta: tuple[PositiveFloat, PositiveFloat] = (2.0, 2.0)
    """Both parameters of `beta`: equal ones give a bell around 0.5, a larger first one favours noise."""
    custom: tuple[float, ...] = ()
    """The noise levels that `custom` chooses from, each in (0, 1]."""
    weighting: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    """Density of `sigma` (logit_normal, mode) or loss weight (sigma_sqrt, cosmap, with sigma_scaled)."""
    logit_mean: float = 0.0
    """Mean of logit_normal."""
    logit_std: PositiveFloat = 1.0
    """Standard deviation of logit_normal."""
    mode_scale: float = 1.29
    """Scale of mode."""
    prediction: Literal["raw", "additive", "sigma_scaled"] = "raw"
    """What the model's output means; raw (velocity) is what FLUX is, the others exist for old recipes."""
    min_sigma: float = Field(default=0.0, ge=0, le=1)
    """Lowest noise level trained."""
    max_sigma: float = Field(default=1.0, ge=0, le=1)
    """Highest noise level trained."""
    input_noise: NonNegativeFloat = 0.0
    """Extra Gaussian noise on the model's input, not in the target, as a factor on the noise (input perturbation, Ning et al. 2023)."""
    input_noise_random: bool = False
    """Draw that factor uniformly between 0 and `input_noise` for each sample."""
    guidance: NonNegativeFloat | tuple[NonNegativeFloat, NonNegativeFloat] = 1.0
    """Value of the guidance embedder, or (low, high) drawn uniformly per sample; models without the embedder ignore it."""


class EmaConfig(Section):
    """A running average of the trained weights, saved beside them and used for samples."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """Share kept per step; warmed up as min(decay, (1 + step) / (10 + step))."""


class TrainConfig(Section):
    """Length, precision and safety of the loop."""

    steps: PositiveInt | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: PositiveInt | None = None
    """Passes over the data."""
    first_step: NonNegativeInt = 0
    """Begin after this many steps, as if they had been done: for weights that were trained that far elsewhere. A state knows its own."""
    first_epoch: PositiveInt = 1
    """Begin with this epoch, in the same sense."""
    seed: NonNegativeInt = 0
    """Seed of every draw."""
    accumulation: PositiveInt = 1
    """Micro-batches in one optimizer step."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 is off."""
    precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Autocast type of forward and backward (mixed precision); auto is bf16 on a card and no on the CPU."""
    base_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of frozen weights; auto is bf16 on a card and fp32 on the CPU."""
    weights_dtype: Dtype = "fp32"
    """Type of trained weights (bf16 or fp16 is what others call full_bf16, full_fp16)."""
    components: tuple[Component, ...] = ("dit",)
    """What a run without an adapter trains."""
    ema: EmaConfig | None = None
    """Average of the weights."""
    nonfinite: Literal["stop", "skip_step"] = "stop"
    """A loss or gradient that is not finite: stop before the weights are touched, or skip at most three steps in a row."""
    dry_step: bool = True
    """Run the largest bucket once before step 1, so that lack of memory shows at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training runs."""
    threads: NonNegativeInt = 0
    """CPU threads; 0 leaves torch's choice. Part of a run's identity on the CPU."""


class CacheConfig(Section):
    """Latents and text states computed once."""

    latents: Literal["disk", "memory", "off"] = "disk"
    """Where encoded pictures are kept; off encodes at every step."""
    text: Literal["disk", "memory", "off"] = "disk"
    """Where encoded captions are kept; off encodes at every step (needed when a text encoder is trained)."""
    dir: Path | None = None
    """Folder of the disk caches; by default `cache/` in the run folder."""
    verify: bool = False
    """Read every picture again instead of trusting size and time of change."""
    batch_size: PositiveInt = 8
    """Pictures or captions encoded at a time."""


class SampleConfig(Section):
    """Pictures made while training."""

    prompt: str
    """What to draw."""
    negative: str = ""
    """What to avoid (with `cfg` other than 1)."""
    every: NonNegativeInt = 0
    """Every N steps; 0 is only before the first and after the last step."""
    every_epochs: NonNegativeInt = 0
    """Every N epochs; 0 is off."""
    first: bool = True
    """Also before step 1, for comparison."""
    last: bool = True
    """Also after the last step."""
    width: PositiveInt = 1024
    """Pixels, multiple of 16."""
    height: PositiveInt = 1024
    """Pixels, multiple of 16."""
    steps: PositiveInt = 20
    """Sampling steps."""
    guidance: NonNegativeFloat = 3.5
    """Embedded guidance."""
    cfg: NonNegativeFloat = 1.0
    """True classifier-free guidance; 1 is off."""
    seed: NonNegativeInt = 42
    """Seed of the noise."""
    control_image: Path | None = None
    """Condition picture, for runs with control models."""
    count: PositiveInt = 1
    """Pictures with seeds seed, seed + 1, ..."""


class ValidationConfig(Section):
    """Loss on pictures that are not trained, at fixed noise levels and noise."""

    every: NonNegativeInt = 0
    """Steps between two measurements; 0 is off."""
    every_epochs: NonNegativeInt = 0
    """Epochs between two measurements; 0 is off."""
    share: float = Field(default=0.0, ge=0, lt=1)
    """Share of each dataset that is held out."""
    sigmas: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    """Noise levels measured."""
    seed: NonNegativeInt = 0
    """Seed of the split and the noise."""
    max_batches: PositiveInt = 16
    """At most this many batches."""


class CheckpointConfig(Section):
    """Resumable states and the weights files written along the way."""

    every: NonNegativeInt = 0
    """Steps between two checkpoints; 0 is only at the end."""
    every_epochs: NonNegativeInt = 0
    """Epochs between two checkpoints; 0 is off."""
    keep: PositiveInt = 2
    """Resumable states kept; weights files are all kept unless `keep_weights` is set."""
    keep_weights: PositiveInt | None = None
    """Intermediate weights files kept."""
    naming: Literal["fluxsmith", "sd-scripts"] = "fluxsmith"
    """Names of weights files: NAME-step00000500, or as sd-scripts (NAME-000002 after an epoch)."""
    weights_dir: Path | None = None
    """Folder of the weights files; by default `weights/` in the run folder."""
    keep_epochs: PositiveInt | None = None
    """Intermediate weights of epochs kept: those of the last N epochs."""
    keep_steps: PositiveInt | None = None
    """Intermediate weights of steps kept: those of the last N steps."""
    state_dir: Path | None = None
    """Also put every resumable state here under sd-scripts' names (NAME-step00000500-state, NAME-state), as links to the same bytes."""
    state_at: Literal["checkpoints", "end"] = "checkpoints"
    """When `state_dir` gets a state: at every checkpoint and at the end, or only at the end."""
    keep_state_epochs: PositiveInt | None = None
    """States of epochs kept in `state_dir`; by default as `keep_epochs`."""
    keep_state_steps: PositiveInt | None = None
    """States of steps kept in `state_dir`; by default as `keep_steps`."""
    format: Literal["kohya", "peft"] = "kohya"
    """Key names of the adapter file: kohya (sd-scripts, ComfyUI, Forge, diffusers) or peft (diffusers)."""
    dtype: Dtype = "bf16"
    """Type of the weights files (the resumable state always keeps full precision)."""
    metadata: Literal["full", "minimal"] = "full"
    """minimal leaves out captions, folder names and settings."""
    title: str = ""
    """modelspec title; by default the run's name."""
    author: str = ""
    """modelspec author."""
    license: str = ""
    """modelspec license."""
    trigger_phrase: str = ""
    """modelspec trigger phrase."""
    modelspec: dict[str, str] = {}
    """Further modelspec entries: description, tags, usage_hint, thumbnail (a file becomes a data URL), merged_from, preprocessor, ..."""
    comment: str = ""
    """ss_training_comment: free text."""
    ss: dict[str, str] = {}
    """Further ss_ entries by their names without `ss_`; they replace those that a run writes by itself."""


class RunSection(Section):
    """Where the run lives."""

    dir: Path
    """The run folder; everything the run writes is in it."""
    name: str = ""
    """Name of the weights files; by default the folder's name."""
    grace_seconds: PositiveFloat = 30.0
    """Seconds that your machine leaves between a stop signal and a kill; a run warns when saving takes longer."""


class BaseAdapterConfig(Section):
    """An adapter that becomes part of the frozen base before training."""

    path: Path
    """Adapter file, in any format that can be read."""
    strength: float = 1.0
    """1 is as it was trained."""


class RunConfig(Section):
    """One training run."""

    fluxsmith_config: Literal[1] = 1
    """Version of this file's format."""
    model: Annotated[PluginConfig, Choice("fluxsmith.models.family")]
    """The base model and its files."""
    adapter: Annotated[PluginConfig, Choice("fluxsmith.adapters")] | None = None
    """What is trained beside the frozen base; without it the base itself is trained."""
    base_adapters: list[BaseAdapterConfig] = []
    """Adapters merged into the base before training."""
    quant: Annotated[PluginConfig, Choice("fluxsmith.quant")] | None = None
    """How the frozen transformer is stored; without it in `train.base_dtype`."""
    control: list[Annotated[PluginConfig, Choice("fluxsmith.controls")]] = []
    """Control models beside the transformer; one of them may be what is trained."""
    optim: Annotated[PluginConfig, Choice("fluxsmith.optim")] = Field(default={"type": "torch"}, validate_default=True)  # type: ignore[assignment]  # the choice turns the dict into a Config
    """The optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate schedule."""
    objective: Annotated[PluginConfig, Choice("fluxsmith.train.objectives")] = Field(default={"type": "flow"}, validate_default=True)  # type: ignore[assignment]  # as above
    """What is minimised."""
    noise: NoiseConfig = NoiseConfig()
    """Noise levels and prediction."""
    memory: MemoryConfig = MemoryConfig()
    """Memory for time."""
    distributed: DistributedConfig = DistributedConfig()
    """One model over several cards."""
    train: TrainConfig
    """The loop."""
    data: list[Annotated[DatasetConfig, Choice("fluxsmith.data.sources")]] = Field(min_length=1)
    """The datasets."""
    cache: CacheConfig = CacheConfig()
    """Caches of encoded pictures and captions."""
    sample: list[SampleConfig] = []
    """Pictures made while training."""
    validation: ValidationConfig = ValidationConfig()
    """Validation loss."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """States and weights files."""
    sinks: list[Annotated[PluginConfig, Choice("fluxsmith.train.sinks")]] = []
    """Listeners beside the progress bar, the event log and the report."""
    run: RunSection
    """The run folder."""


def as_plain(config: Section) -> dict[str, Any]:
    """The config as JSON-ready values (paths are strings)."""
    return config.model_dump(mode="json")
