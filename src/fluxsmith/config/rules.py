"""Rules across sections: pairs of values that pydantic cannot judge one by one, each a small function.

A rule yields `Finding`s; `findings(config)` collects those of all rules, so that a user sees everything at once.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from fluxsmith.config import adapter_rules, model_rules
from fluxsmith.config.adapter import AdapterConfig
from fluxsmith.config.data_rules import data_findings
from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.config.finding import Finding
from fluxsmith.config.optimizer import OptimizerConfig
from fluxsmith.config.schema import RunConfig
from fluxsmith.config.sections import KeyPath

ENCODERS = ("clip_l", "t5xxl")
PIXEL_STEP = 16  # the autoencoder's 8 times the 2 x 2 patches of the transformer


Rule = Callable[[RunConfig], Iterator[Finding]]


def findings(config: RunConfig) -> list[Finding]:
    """All broken rules of a config whose single values are fine."""
    return [finding for rule in RULES for finding in rule(config)]


def trained_text_encoders(config: RunConfig) -> tuple[str, ...]:
    """Text encoders whose weights, or an adapter in them, are trained."""
    if config.adapter is None:
        return tuple(name for name in ENCODERS if name in config.train.components)
    return config.adapter.text_encoders if isinstance(config.adapter, AdapterConfig) else ()


def _datasets(config: RunConfig) -> Iterator[tuple[int, DatasetConfig]]:
    for index, data in enumerate(config.data):
        if isinstance(data, DatasetConfig):
            yield index, data


def length(config: RunConfig) -> Iterator[Finding]:
    """Steps or epochs, one of them."""
    if config.train.steps is None and config.train.epochs is None:
        yield Finding(("train",), "the length of the run is missing", "add train.steps (or train.epochs)")
    if config.train.steps is not None and config.train.epochs is not None:
        fix = "keep one; train.steps=null on the command line takes a value of the file away"
        yield Finding(("train", "epochs"), "train.steps and train.epochs are both given", fix)


def adapter_or_components(config: RunConfig) -> Iterator[Finding]:
    """With an adapter the base is frozen."""
    if config.adapter is not None and config.train.components != ("dit",):
        fix = "remove [adapter] to train whole components, or remove train.components"
        yield Finding(("train", "components"), "train.components has no effect beside an adapter", fix, "the base is frozen")


def adapter_options(config: RunConfig) -> Iterator[Finding]:
    """Options of the adapter that nothing would read."""
    adapter = config.adapter
    if not isinstance(adapter, AdapterConfig):
        return
    for name, rate in (("clip_l", adapter.clip_l_lr), ("t5xxl", adapter.t5xxl_lr)):
        if rate is not None and name not in adapter.text_encoders:
            fix = f'add "{name}" to adapter.text_encoders, or remove the rate'
            yield Finding(("adapter", f"{name}_lr"), f"adapter.{name}_lr has no effect: {name} is not adapted", fix)
    if adapter.rank_from_file and adapter.init_from is None:
        fix = "add adapter.init_from, or remove adapter.rank_from_file"
        yield Finding(("adapter", "rank_from_file"), "adapter.rank_from_file needs a file", fix)


def components(config: RunConfig) -> Iterator[Finding]:
    """At least one component, each once."""
    names = config.train.components
    if not names or len(set(names)) != len(names):
        yield Finding(("train", "components"), "train.components must name each trained component once", 'write ["dit"]')


def text_cache(config: RunConfig) -> Iterator[Finding]:
    """Cached text states would be those of the untrained encoder; CLIP-L alone is run live beside cached T5 states."""
    if "t5xxl" in trained_text_encoders(config) and config.cache.text != "off":
        why = f'cache.text is "{config.cache.text}"'
        yield Finding(("cache", "text"), "the states of a T5 that is trained cannot be cached", 'write cache.text = "off"', why)


def latent_cache(config: RunConfig) -> Iterator[Finding]:
    """Cached latents would be those of the untrained autoencoder."""
    if config.adapter is None and "ae" in config.train.components and config.cache.latents != "off":
        fix = 'write cache.latents = "off"'
        yield Finding(("cache", "latents"), "an autoencoder that is trained cannot be cached", fix, f'it is "{config.cache.latents}"')


def datasets(config: RunConfig) -> Iterator[Finding]:
    """Options of datasets that need or exclude each other; see `data_rules`."""
    yield from data_findings(list(_datasets(config)), config.cache)


def noise_range(config: RunConfig) -> Iterator[Finding]:
    """The trained noise levels are a range; guidance too."""
    noise = config.noise
    if noise.min_sigma >= noise.max_sigma:
        why = f"they are {noise.min_sigma} and {noise.max_sigma}"
        yield Finding(("noise", "min_sigma"), "noise.min_sigma must be below noise.max_sigma", "exchange or change them", why)
    if isinstance(noise.guidance, tuple) and noise.guidance[0] > noise.guidance[1]:
        yield Finding(("noise", "guidance"), "noise.guidance is (low, high)", "put the smaller value first")


def custom_levels(config: RunConfig) -> Iterator[Finding]:
    """The list of noise levels and the sampling that reads it come together."""
    noise = config.noise
    if (noise.sampling == "custom") != bool(noise.custom):
        fix = "write both, for example custom = [0.25, 0.5, 0.75, 1.0], or neither"
        yield Finding(("noise", "custom"), 'noise.custom belongs to noise.sampling = "custom"', fix)
    if any(not 0 < level <= 1 for level in noise.custom):
        yield Finding(("noise", "custom"), "noise levels are above 0 and at most 1", "divide timesteps by 1000")
    if noise.sampling == "custom" and (noise.auto_shift or noise.min_sigma > 0 or noise.max_sigma < 1):
        yield Finding(("noise", "custom"), "custom levels are used as they are", "remove auto_shift, min_sigma and max_sigma")


def weighting(config: RunConfig) -> Iterator[Finding]:
    """A weighting that nothing reads is a wish that is not granted."""
    noise = config.noise
    if noise.weighting in ("logit_normal", "mode") and noise.sampling != "sigma":
        fix = 'write noise.sampling = "sigma", or noise.weighting = "none"'
        why = f'noise.sampling is "{noise.sampling}"'
        yield Finding(("noise", "weighting"), f'weighting "{noise.weighting}" is a density of sampling "sigma"', fix, why)
    if noise.weighting in ("sigma_sqrt", "cosmap") and noise.prediction != "sigma_scaled":
        fix = 'write noise.prediction = "sigma_scaled", or noise.weighting = "none"'
        why = f'noise.prediction is "{noise.prediction}"'
        yield Finding(("noise", "weighting"), f'weighting "{noise.weighting}" belongs to prediction "sigma_scaled"', fix, why)


def auto_shift(config: RunConfig) -> Iterator[Finding]:
    """Sampling sigma takes its shift from noise.shift alone."""
    if config.noise.auto_shift and config.noise.sampling == "sigma":
        yield Finding(("noise", "auto_shift"), 'noise.auto_shift has no effect on sampling "sigma"', 'write noise.sampling = "shift"')


def schedule(config: RunConfig) -> Iterator[Finding]:
    """Warm-up and decay fit into the run; what belongs to one schedule is given with it alone."""
    plan, steps = config.schedule, config.train.steps
    for key, value, name in (
        ("rules", plan.rules, "piecewise_constant"),
        ("path", plan.path, "imported"),
        ("options", plan.options, "imported"),
        ("decay", plan.decay, "warmup_stable_decay"),
        ("decay_shape", plan.decay_shape != "linear", "warmup_stable_decay"),
        ("timescale", plan.timescale, "inverse_sqrt"),
    ):
        if value and plan.name != name:
            fix = f'write schedule.name = "{name}", or remove schedule.{key}'
            yield Finding(("schedule", key), f'schedule.{key} has no effect on schedule "{plan.name}"', fix)
    for key, value, name, example in (
        ("rules", plan.rules, "piecewise_constant", "1:500,0.1"),
        ("path", plan.path, "imported", "CosineAnnealingLR"),
    ):
        if plan.name == name and not value:
            yield Finding(("schedule", key), f'schedule "{name}" needs schedule.{key}', f'write schedule.{key} = "{example}"')
    spent = sum(value if value >= 1 else value * (steps or 1) for value in (plan.warmup, plan.decay))
    if steps is not None and spent > steps:
        fix = "shorten them; values below 1 are shares of the run"
        yield Finding(("schedule", "warmup"), f"warm-up and decay take {spent:g} of {steps} steps", fix)


def own_rate(config: RunConfig) -> Iterator[Finding]:
    """An optimizer that finds its rate reads no schedule."""
    optim, plan = config.optim, config.schedule
    if isinstance(optim, OptimizerConfig) and not optim.uses_schedule() and (plan.name != "constant" or plan.warmup):
        fix = 'write schedule = { name = "constant" } (warmup_init = true in optim.options is its own warm-up)'
        yield Finding(("schedule", "name"), "the schedule has no effect: the optimizer makes its own rate (relative_step)", fix)


def sample_size(config: RunConfig) -> Iterator[Finding]:
    """Pictures are made of 16-pixel patches."""
    for index, sample in enumerate(config.sample):
        for name, value in (("width", sample.width), ("height", sample.height)):
            if value % PIXEL_STEP:
                fix = f"write {max(PIXEL_STEP, round(value / PIXEL_STEP) * PIXEL_STEP)}"
                yield Finding(("sample", index, name), f"sample.{index}.{name} = {value} is not a multiple of {PIXEL_STEP}", fix)


def sample_negative(config: RunConfig) -> Iterator[Finding]:
    """A negative prompt is read by true guidance only."""
    for index, sample in enumerate(config.sample):
        if sample.negative and sample.cfg == 1:
            fix = f"write sample.{index}.cfg = 3.5, or remove the negative prompt"
            yield Finding(("sample", index, "negative"), "a negative prompt has no effect while cfg is 1", fix)


def bucket_sizes(config: RunConfig) -> Iterator[Finding]:
    """Bucket sides are 16-pixel multiples, smallest before largest."""
    for index, data in _datasets(config):
        key: KeyPath = ("data", index, "buckets")
        sides = data.resolution if isinstance(data.resolution, tuple) else (data.resolution,)
        if data.buckets.step % PIXEL_STEP:
            fix = f"write {PIXEL_STEP}, 32 or 64"
            yield Finding((*key, "step"), f"buckets.step = {data.buckets.step} is not a multiple of {PIXEL_STEP}", fix)
        if data.buckets.min > data.buckets.max:
            yield Finding((*key, "min"), "buckets.min is above buckets.max", "exchange them")
        if min(sides) < PIXEL_STEP or (not data.buckets.enabled and any(side % PIXEL_STEP for side in sides)):
            fix = f"write a multiple of {PIXEL_STEP}"
            yield Finding(("data", index, "resolution"), f"resolution {data.resolution} does not fit {PIXEL_STEP}-pixel patches", fix)


def captions(config: RunConfig) -> Iterator[Finding]:
    """Caption options that cancel each other."""
    for index, data in _datasets(config):
        options, key = data.captions, ("data", index, "captions")
        if (options.shuffle or options.tag_dropout) and not options.separator:
            fix = 'write captions.separator = ","'
            yield Finding((*key, "separator"), "tags cannot be shuffled or dropped without a separator", fix)


def validation(config: RunConfig) -> Iterator[Finding]:
    """Measuring needs pictures, and held-out pictures need measuring."""
    part = config.validation
    is_held_out = bool(part.share) or any(data.validation_share for _, data in _datasets(config))
    if (part.every or part.every_epochs) and not is_held_out:
        yield Finding(("validation", "share"), "validation has no pictures", "write validation.share = 0.1, or validation.every = 0")
    if is_held_out and not (part.every or part.every_epochs):
        fix = "write validation.every = 100 (or every_epochs = 1), or hold nothing out"
        yield Finding(("validation", "every"), "pictures are held out but never measured", fix)
    if not part.sigmas or not all(0 < sigma <= 1 for sigma in part.sigmas):
        yield Finding(("validation", "sigmas"), "validation.sigmas must be noise levels above 0, up to 1", "write [0.2, 0.4, 0.6, 0.8]")


def run_dir(config: RunConfig) -> Iterator[Finding]:
    """Sample pictures must not become training pictures."""
    target = config.run.dir.absolute()
    for index, data in enumerate(config.data):
        path = data.model_dump().get("path")
        if isinstance(path, Path) and target.is_relative_to(path.absolute()):
            fix = f"choose a folder outside {path}"
            yield Finding(("run", "dir"), f"run.dir lies inside the pictures of data.{index}", fix, "samples would be trained on")


RULES: tuple[Rule, ...] = (
    length,
    adapter_or_components,
    adapter_options,
    components,
    text_cache,
    latent_cache,
    datasets,
    noise_range,
    custom_levels,
    weighting,
    auto_shift,
    schedule,
    own_rate,
    sample_size,
    sample_negative,
    bucket_sizes,
    captions,
    validation,
    run_dir,
    *model_rules.RULES,
    *adapter_rules.RULES,
)
