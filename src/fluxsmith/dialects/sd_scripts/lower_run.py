"""Options about length, loss, files, states, samples, validation and logs -> `train`, `noise`, `checkpoint`, `sample`, ..."""

import json
from pathlib import Path

from fluxsmith.dialects.base import Draft
from fluxsmith.dialects.sd_scripts.prompts import read_prompts

SEED = 42
ALL_BATCHES = 1_000_000  # validation without a cap
TIMESTEPS = 1000
DTYPES = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}
HUBER = ("huber", "smooth_l1")
SS_ENTRIES = {  # option -> entry of the metadata without `ss_`
    **{
        name: name
        for name in (
            "v2", "clip_skip", "max_token_length", "lowram", "noise_offset", "noise_offset_random_strength", "multires_noise_iterations",
            "multires_noise_discount", "adaptive_noise_scale", "zero_terminal_snr", "min_snr_gamma", "lr_scheduler", "lr_warmup_steps",
            "weighting_scheme", "huber_schedule", "unet_lr", "text_encoder_lr", "network_dropout", "fp8_base", "fp8_base_unet", "full_fp16",
        )
    },
    "debiased_estimation_loss": "debiased_estimation",
}  # fmt: skip
LISTENERS = ("tensorboard", "all")


def loss(draft: Draft) -> None:
    """Thresholds of huber and smooth_l1; sd-scripts' default schedule cannot work for FLUX."""
    draft.put("objective.type", "flow")
    if draft["loss_type"] not in HUBER:
        for name in ("huber_c", "huber_scale", "huber_schedule"):
            if draft.has(name):
                draft.note(f"--{name}", f"has no effect with --loss_type {draft['loss_type']}")
        return
    shape = draft["huber_schedule"]
    if shape == "snr":
        shape = "constant"
        draft.note("--huber_schedule", "snr needs the noise of Stable Diffusion (sd-scripts stops there): constant is used")
    draft.put("objective.huber_schedule", shape, "--huber_schedule")
    draft.put("objective.huber_c", draft["huber_c"], "--huber_c")
    draft.put("objective.huber_scale", draft["huber_scale"], "--huber_scale")


def weighting(draft: Draft) -> None:
    """A scheme is a density of sampling `sigma`, or a weight of prediction `sigma_scaled`; elsewhere sd-scripts passes over it."""
    scheme = draft["weighting_scheme"]
    fits = {
        "logit_normal": draft["timestep_sampling"] == "sigma",
        "mode": draft["timestep_sampling"] == "sigma",
        "sigma_sqrt": draft["model_prediction_type"] == "sigma_scaled",
        "cosmap": draft["model_prediction_type"] == "sigma_scaled",
    }
    if not fits.get(scheme, True):
        draft.note("--weighting_scheme", f"{scheme} has no effect with this sampling and prediction, in sd-scripts neither")
        scheme = "none"
    draft.put("noise.weighting", "none" if scheme == "uniform" else scheme, "--weighting_scheme")


def timestep_range(draft: Draft) -> None:
    """Timesteps 0..1000 as noise levels; sd-scripts takes the options and does nothing with them for FLUX."""
    for name, key in (("min_timestep", "min_sigma"), ("max_timestep", "max_sigma")):
        value = draft[name]
        if value is None:
            continue
        if not 0 <= value <= TIMESTEPS:
            draft.refuse(draft.where(name), f"--{name} = {value}", f"give 0 to {TIMESTEPS}")
        draft.put(f"noise.{key}", value / TIMESTEPS, f"--{name}")
        draft.note(f"--{name}", "takes effect here; sd-scripts does nothing with it for FLUX")


def length(draft: Draft) -> None:
    """Epochs win over steps."""
    for name, key in (("max_train_epochs", "epochs"), ("max_train_steps", "steps")):
        value = draft[name]
        if value is None:
            continue
        if value < 1:
            draft.refuse(draft.where(name), f"--{name} = {value}", "give 1 or more")
        draft.put(f"train.{key}", value, f"--{name}")
        if key == "epochs" and draft.has("max_train_steps"):
            draft.note("--max_train_steps", "has no effect beside --max_train_epochs")
        return


def seed(draft: Draft) -> None:
    """sd-scripts draws a seed and does not say which; here it is a fixed one."""
    if draft["seed"] is None:
        draft.note("--seed", f"not given: {SEED} is used, so that the run can be repeated")
    draft.put("train.seed", SEED if draft["seed"] is None else draft["seed"], "--seed")


def output(draft: Draft) -> None:
    """Weights go to --output_dir under sd-scripts' names; the rest of the run into a folder beside them."""
    folder = draft["output_dir"]
    if not folder:
        draft.refuse("--output_dir", "where to write is not given", "add --output_dir output")
        folder = "."
    name = draft["output_name"] or "last"
    draft.put("run.dir", str(Path(folder) / f"{name}.run"), "--output_dir")
    draft.put("run.name", name, "--output_name")
    draft.put("checkpoint.naming", "sd-scripts")
    draft.put("checkpoint.weights_dir", str(folder), "--output_dir")


def file_format(draft: Draft) -> None:
    """Safetensors, in the type of --save_precision, or that of the trained weights."""
    form = draft["save_model_as"]
    if form in ("ckpt", "pt"):
        fix = "write --save_model_as safetensors"
        draft.refuse(draft.where("save_model_as"), f"{form} files can run code when they are loaded", fix)
    wanted = draft["save_precision"]
    draft.put("checkpoint.dtype", DTYPES[wanted] if wanted else draft.get("train.weights_dtype") or "fp32", "--save_precision")


def checkpoints(draft: Draft) -> None:
    """When weights are written, and how many are kept."""
    epochs, steps = draft["save_every_n_epochs"], draft["save_every_n_steps"]
    ratio = draft["save_n_epoch_ratio"]
    if ratio:
        total = draft["max_train_epochs"]
        if total is None:
            fix = "add --max_train_epochs N, or write --save_every_n_epochs N"
            draft.refuse(draft.where("save_n_epoch_ratio"), "--save_n_epoch_ratio needs the number of epochs", fix)
        else:
            epochs = max(1, total // ratio)
            draft.note("--save_n_epoch_ratio", f"{ratio} of {total} epochs: the same as --save_every_n_epochs {epochs}")
    if epochs:
        draft.put("checkpoint.every_epochs", epochs, "--save_every_n_epochs")
    if steps:
        draft.put("checkpoint.every", steps, "--save_every_n_steps")
    for kind, interval, key in (("epochs", epochs, "keep"), ("steps", steps, "keep")):
        _window(draft, f"save_last_n_{kind}", interval, f"checkpoint.{key}_{kind}")
        if draft["save_state"]:
            _window(draft, f"save_last_n_{kind}_state", interval, f"checkpoint.{key}_state_{kind}")
        elif draft.has(f"save_last_n_{kind}_state"):
            draft.note(f"--save_last_n_{kind}_state", "has no effect without --save_state")


def _window(draft: Draft, name: str, interval: int | None, key: str) -> None:
    """The last so many saves of epochs; the saves of the last so many steps."""
    count = draft[name]
    if not count:
        return
    if not interval:
        kind = "epochs" if "epochs" in name else "steps"
        draft.note(f"--{name}", f"has no effect without --save_every_n_{kind}")
        return
    draft.put(key, count, f"--{name}")


def states(draft: Draft) -> None:
    """Resumable states under sd-scripts' names."""
    if draft["save_state"] or draft["save_state_on_train_end"]:
        draft.put("checkpoint.state_dir", draft["output_dir"] or ".", "--save_state")
        draft.put("checkpoint.state_at", "checkpoints" if draft["save_state"] else "end", "--save_state")


def resume(draft: Draft) -> None:
    """A state knows its step. Without a state, a start step shortens the run, as sd-scripts counts it."""
    given = [name for name in ("initial_epoch", "initial_step") if draft[name]]
    if draft["resume"]:
        draft.note("--resume", "the run continues exactly where the state was saved: step, data position, optimizer and draws")
        for name in given:
            draft.note(f"--{name}", "has no effect: the state knows its step")
        return
    if draft["initial_step"]:
        _shorten(draft, "initial_step", "steps", draft["initial_step"])
    elif draft["initial_epoch"]:
        _shorten(draft, "initial_epoch", "epochs", draft["initial_epoch"] - 1)


def _shorten(draft: Draft, name: str, unit: str, done: int) -> None:
    total = draft.get(f"train.{unit}")
    if total is None:
        draft.refuse(draft.where(name), f"--{name} needs the length of the run in {unit}", f"add --max_train_{unit} N")
    elif done >= total:
        draft.refuse(draft.where(name), f"--{name}: {done} of {total} {unit} are done already", f"raise --max_train_{unit}")
    else:
        draft.put(f"train.{unit}", total - done, f"--{name}")
        draft.note(f"--{name}", f"without a state it only shortens the run, to {total - done} {unit}; use --resume DIR to continue a run")


def metadata(draft: Draft) -> None:
    """`--no_metadata` keeps only what loaders read. Words of sd-scripts that the run itself would not know are passed on."""
    draft.put("checkpoint.metadata", "minimal" if draft["no_metadata"] else "full", "--no_metadata")
    entries = {key: str(draft[name]) for name, key in SS_ENTRIES.items() if _differs(draft, name)}
    pairs = [item.partition("=") for item in draft["network_args"] or []]
    entries["network_args"] = json.dumps({key.strip(): text for key, _, text in pairs})
    if _differs(draft, "optimizer_type"):
        entries["optimizer"] = f"{draft['optimizer_type']}({','.join(draft['optimizer_args'] or [])})"
    draft.put("checkpoint.ss", entries, "--network_args")


def _differs(draft: Draft, name: str) -> bool:
    """Is there another value than sd-scripts' default?"""
    return draft.has(name) and draft[name] != draft.rows[name].default


def samples(draft: Draft) -> None:
    """Pictures while training. Epochs win over steps; sd-scripts draws none at the end."""
    epochs, steps = draft["sample_every_n_epochs"], draft["sample_every_n_steps"]
    epochs, steps = max(epochs or 0, 0), max(steps or 0, 0)
    wanted = bool(epochs or steps or draft["sample_at_first"])
    if not draft["sample_prompts"]:
        if wanted:
            where = draft.where("sample_every_n_epochs" if epochs else "sample_every_n_steps" if steps else "sample_at_first")
            draft.refuse(where, "samples are asked for, but there are no prompts", "add --sample_prompts FILE")
        return
    if not wanted:
        draft.note("--sample_prompts", "nothing says when: add --sample_every_n_epochs N, --sample_every_n_steps N or --sample_at_first")
        return
    if epochs and draft.has("sample_every_n_steps"):
        draft.note("--sample_every_n_steps", "has no effect beside --sample_every_n_epochs")
    cadence = {"every": 0 if epochs else steps, "every_epochs": epochs, "first": bool(draft["sample_at_first"]), "last": False}
    entries = read_prompts(draft, Path(draft["sample_prompts"]))
    draft.put("sample", [{**entry, **cadence} for entry in entries], "--sample_prompts")


def validation(draft: Draft) -> None:
    """Held-out pictures at four fixed noise levels; every epoch unless said otherwise."""
    shares = [entry["validation_share"] for entry in draft.tree.get("data", []) if "validation_share" in entry]
    if not any(shares):
        return
    steps, epochs = draft["validate_every_n_steps"], draft["validate_every_n_epochs"]
    if steps:
        draft.put("validation.every", steps, "--validate_every_n_steps")
    draft.put("validation.every_epochs", 1 if epochs is None else epochs, "--validate_every_n_epochs")
    own = draft["validation_seed"]
    draft.put("validation.seed", draft.get("train.seed") if own is None else own, "--validation_seed")
    low, high = draft["min_timestep"] or 0, TIMESTEPS if draft["max_timestep"] is None else draft["max_timestep"]
    draft.put("validation.sigmas", [round(low + (high - low) * part / 5) / TIMESTEPS for part in (1, 2, 3, 4)], "--validation_split")
    draft.put("validation.max_batches", draft["max_validation_steps"] or ALL_BATCHES, "--max_validation_steps")


def logging(draft: Draft) -> None:
    """Event files for TensorBoard; the run folder has its own log and report in any case."""
    kind, folder = draft["log_with"], draft["logging_dir"]
    if kind in LISTENERS and not folder:
        draft.refuse(draft.where("log_with"), f"--log_with {kind} needs a folder", "add --logging_dir logs")
    if kind in ("wandb", "all"):
        text = "there is no Weights & Biases tracker: losses and pictures are in the run folder's report.html and events.jsonl"
        draft.note("--log_with", text)
    if folder and kind != "wandb":
        name = f"{draft['log_prefix'] or ''}{draft.get('run.name')}"
        draft.put("sinks", [{"type": "tensorboard", "dir": str(Path(folder) / name)}], "--logging_dir")
    elif draft["log_prefix"]:
        draft.note("--log_prefix", "has no effect without --logging_dir")
