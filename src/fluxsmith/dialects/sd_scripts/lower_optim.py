"""Optimizers and learning rate schedules by sd-scripts' names -> `optim` and `schedule`.

A class by dotted path runs foreign code, so it is taken from the command line only, never from a config file.
"""

import ast
from typing import Any

from fluxsmith.dialects.arguments import nearest
from fluxsmith.dialects.base import Draft

# name (lower case) -> type and name of the native optimizer, weight decay where none is given, further arguments
OPTIMIZERS: dict[str, tuple[str, str, float, dict[str, Any]]] = {
    "adamw": ("torch", "adamw", 0.01, {}),
    "adamw8bit": ("bnb", "adamw8bit", 0.01, {}),
    "pagedadamw": ("bnb", "paged_adamw", 0.01, {}),
    "pagedadamw8bit": ("bnb", "paged_adamw8bit", 0.01, {}),
    "pagedadamw32bit": ("bnb", "paged_adamw32bit", 0.01, {}),
    "lion": ("lion", "", 0.0, {}),
    "lion8bit": ("bnb", "lion8bit", 0.0, {}),
    "pagedlion8bit": ("bnb", "paged_lion8bit", 0.0, {}),
    "sgdnesterov": ("torch", "sgd", 0.0, {"nesterov": True, "momentum": 0.9}),
    "sgdnesterov8bit": ("bnb", "sgd8bit", 0.0, {"nesterov": True, "momentum": 0.9}),
    "dadaptation": ("dadapt", "adam_preprint", 0.0, {}),
    "dadaptadampreprint": ("dadapt", "adam_preprint", 0.0, {}),
    "dadaptadagrad": ("dadapt", "adagrad", 0.0, {}),
    "dadaptadam": ("dadapt", "adam", 0.0, {}),
    "dadaptadan": ("dadapt", "adan", 0.02, {}),
    "dadaptadanip": ("dadapt", "adan_ip", 0.02, {}),
    "dadaptlion": ("dadapt", "lion", 0.0, {}),
    "dadaptsgd": ("dadapt", "sgd", 0.0, {}),
    "prodigy": ("prodigy", "", 0.0, {}),
    "adafactor": ("adafactor", "", 0.0, {}),
    "adamwschedulefree": ("schedulefree", "adamw", 0.0, {}),
    "radamschedulefree": ("schedulefree", "radam", 0.0, {}),
    "sgdschedulefree": ("schedulefree", "sgd", 0.0, {}),
}
TORCH = ("Adam", "SGD", "RAdam", "NAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop")  # exact, as in torch.optim
BNB_PATHS = {
    "AdEMAMix8bit": "ademamix8bit",
    "PagedAdEMAMix8bit": "paged_ademamix8bit",
    "AdEMAMix": "ademamix",
    "PagedAdEMAMix": "paged_ademamix",
}
ADAPTIVE = ("dadapt", "prodigy")
# name -> native shape; `constant` allows no warm-up in sd-scripts
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_restarts",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse_sqrt",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "warmup_stable_decay",
    "piecewise_constant": "piecewise_constant",
}
POLYNOMIAL_END = 1e-7  # learning rate at which transformers ends the polynomial schedule


def key_values(draft: Draft, option: str) -> dict[str, Any]:
    """`key=value` words, the values Python literals, as in `betas=(0.9,0.99)`; whatever cannot be read is refused."""
    found: dict[str, Any] = {}
    where = draft.where(option)
    for item in draft[option] or []:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            draft.refuse(where, f"--{option} {item}", "write it as key=value, without spaces around the equals sign")
            continue
        try:
            found[key.strip()] = _plain(ast.literal_eval(text))
        except (ValueError, SyntaxError):
            close = {"true": "True", "false": "False", "none": "None"}.get(text.lower())
            fix = f"write {key}={close}" if close else f"numbers, True, False, (a,b); text needs quotes: {key}=\"'{text}'\""
            draft.refuse(where, f"--{option} {item}: {text!r} is no value", fix)
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def optimizer(draft: Draft) -> None:
    """Type, name, rate, weight decay and arguments."""
    name = _name(draft)
    options = key_values(draft, "optimizer_args")
    entry: dict[str, Any] = _native(draft, name)
    defaults = entry.pop("defaults", {})
    lr: float = draft["learning_rate"]
    if lr <= 0:
        draft.refuse(draft.where("learning_rate"), f"--learning_rate = {lr:g}", "give a rate above 0")
        lr = 1e-6
    entry["lr"] = _number(draft, options, "lr", lr)
    entry["weight_decay"] = _number(draft, options, "weight_decay", float(entry.get("weight_decay") or 0.0))
    merged = {**defaults, **{key: value for key, value in options.items() if value is not None}}
    if merged:
        entry["options"] = merged
    if entry["type"] in ADAPTIVE and entry["lr"] <= 0.1:
        draft.note("--learning_rate", f"{name or 'this optimizer'} finds its own rate: --learning_rate 1.0 is advised, not {entry['lr']:g}")
    if entry["type"] == "schedulefree" and draft["lr_scheduler"] not in ("constant", ""):
        draft.note("--lr_scheduler", f"{name} needs no schedule; {draft['lr_scheduler']} is not used")
    for key, value in entry.items():
        draft.put(
            f"optim.{key}", value, "--optimizer_args" if key == "options" else "--learning_rate" if key == "lr" else "--optimizer_type"
        )
    if entry["type"] == "adafactor":
        _adafactor(draft, merged)


def _number(draft: Draft, options: dict[str, Any], key: str, default: float, option: str = "optimizer_args") -> float:
    """A number taken out of the arguments."""
    value = options.pop(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        draft.refuse(draft.where(option), f"--{option} {key}={value!r} is not a number", "give a number")
        return default
    return float(value)


def _name(draft: Draft) -> str:
    """--optimizer_type, or one of the old switches."""
    name = draft["optimizer_type"] or ""
    for switch, meant in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if draft[switch]:
            if name:
                draft.refuse(draft.where(switch), f"--{switch} and --optimizer_type are both given", f"drop --{switch}")
            draft.note(f"--{switch}", f"an old switch: write --optimizer_type {meant}")
            name = meant
    return name


def _native(draft: Draft, name: str) -> dict[str, Any]:
    known = OPTIMIZERS.get(name.lower() or "adamw")
    if known:
        kind, inner, decay, defaults = known
        return {"type": kind, **({"name": inner} if inner else {}), "weight_decay": decay, "defaults": defaults}
    plain = name.removeprefix("torch.optim.")
    if plain in TORCH:
        return {"type": "torch", "name": plain.lower(), "weight_decay": 0.0}
    last = name.rpartition(".")[2]
    if name.startswith("bitsandbytes.optim.") and last in BNB_PATHS:
        return {"type": "bnb", "name": BNB_PATHS[last], "weight_decay": 0.01}
    if "." in name:
        if draft.where("optimizer_type") != "--optimizer_type":
            fix = "give it on the command line: --optimizer_type " + name
            draft.refuse(draft.where("optimizer_type"), f"{name} would run code that a file names", fix)
        return {"type": "imported", "class": name}
    names = {**{key: key for key in OPTIMIZERS}, **{key.lower(): key for key in TORCH}}
    close = nearest(name, names)
    fix = f"write {names[close]}" if close else f"choose one of {', '.join(sorted(OPTIMIZERS))}, or a class as package.module.Class"
    draft.refuse(draft.where("optimizer_type"), f"there is no optimizer {name}", fix)
    return {"type": "torch", "name": "adamw"}


def _adafactor(draft: Draft, options: dict[str, Any]) -> None:
    """Its relative step (on unless switched off) makes the rate by itself; the other rates and the schedule are then not used."""
    relative = options.get("relative_step", True)
    if options.get("warmup_init") and not relative:
        draft.note("--optimizer_args", "warmup_init=True needs relative_step=True, which is switched on")
        relative = True
    draft.put("optim.options", {"scale_parameter": True, **options, "relative_step": relative}, "--optimizer_args")
    if not relative:
        return
    draft.note(
        "--optimizer_type",
        "Adafactor makes its own rate (relative_step=True): --unet_lr, --text_encoder_lr and --lr_scheduler are not used",
    )
    for key in ("adapter.dit_lr", "adapter.clip_l_lr", "adapter.t5xxl_lr"):
        section, _, last = key.partition(".")
        draft.tree.get(section, {}).pop(last, None)


def schedule(draft: Draft) -> None:
    """Shape, warm-up and the numbers of the shape."""
    if draft.get("optim.type") == "schedulefree" or _makes_own_rate(draft):
        draft.put("schedule.name", "constant", "--lr_scheduler")
        return
    if draft["lr_scheduler_type"]:
        _foreign_schedule(draft)
        return
    name = draft["lr_scheduler"]
    if name.startswith("adafactor"):
        draft.refuse(
            draft.where("lr_scheduler"), f"--lr_scheduler {name} needs Adafactor's relative_step", "add --optimizer_type adafactor"
        )
        return
    shape = SCHEDULES.get(name.lower())
    if shape is None:
        close = nearest(name, SCHEDULES)
        fix = f"write {close}" if close else f"choose one of {', '.join(SCHEDULES)}"
        draft.refuse(
            draft.where("lr_scheduler"), f"there is no schedule {name}", fix, "sd-scripts knows it, and stops" if "_lr" in name else ""
        )
        return
    warmup = draft["lr_warmup_steps"]
    if name == "constant" and warmup:
        draft.refuse(draft.where("lr_warmup_steps"), "constant has no warm-up", "write --lr_scheduler constant_with_warmup")
    draft.put("schedule.name", shape, "--lr_scheduler")
    if warmup:
        draft.put("schedule.warmup", warmup, "--lr_warmup_steps")
        draft.put("schedule.warmup_from", "zero", "--lr_warmup_steps")
    _numbers(draft, name.lower())


def _makes_own_rate(draft: Draft) -> bool:
    return draft.get("optim.type") == "adafactor" and bool((draft.get("optim.options") or {}).get("relative_step", True))


def _numbers(draft: Draft, name: str) -> None:
    """The arguments that the shape reads; sd-scripts passes the others over too."""
    extra = key_values(draft, "lr_scheduler_args")
    NUMBERS.get(name, _no_numbers)(draft, extra)
    for key in extra:
        draft.refuse(draft.where("lr_scheduler_args"), f"{name} has no argument {key}", "leave it out")


def _no_numbers(draft: Draft, extra: dict[str, Any]) -> None:
    """constant, linear and cosine have none."""


def _cycles(draft: Draft, extra: dict[str, Any]) -> None:
    draft.put("schedule.cycles", float(draft["lr_scheduler_num_cycles"]), "--lr_scheduler_num_cycles")


def _polynomial(draft: Draft, extra: dict[str, Any]) -> None:
    draft.put("schedule.power", float(draft["lr_scheduler_power"]), "--lr_scheduler_power")
    draft.put(
        "schedule.min_ratio",
        min(1.0, _number(draft, extra, "lr_end", POLYNOMIAL_END, "lr_scheduler_args") / draft.get("optim.lr")),
        "--lr_scheduler",
    )


def _inverse_sqrt(draft: Draft, extra: dict[str, Any]) -> None:
    if draft["lr_scheduler_timescale"]:
        draft.put("schedule.timescale", draft["lr_scheduler_timescale"], "--lr_scheduler_timescale")


def _floor(draft: Draft, extra: dict[str, Any]) -> None:
    """The lowest rate, as a share or as a rate."""
    ratio = draft["lr_scheduler_min_lr_ratio"]
    rate = draft.get("optim.lr")
    floor = _number(draft, extra, "min_lr", 0.0, "lr_scheduler_args") / rate if "min_lr" in extra else ratio or 0.0
    draft.put("schedule.min_ratio", float(floor), "--lr_scheduler_min_lr_ratio")


def _cosine_with_floor(draft: Draft, extra: dict[str, Any]) -> None:
    if draft["lr_scheduler_min_lr_ratio"] is None and "min_lr" not in extra:
        draft.refuse("--lr_scheduler", "cosine_with_min_lr needs its lowest rate", "add --lr_scheduler_min_lr_ratio 0.1")
    _floor(draft, extra)
    _cycles(draft, extra)


def _stable(draft: Draft, extra: dict[str, Any]) -> None:
    """The decay is a cosine, as in transformers."""
    _floor(draft, extra)
    _cycles(draft, extra)
    draft.put("schedule.decay_shape", "cosine", "--lr_scheduler")
    if draft["lr_decay_steps"]:
        draft.put("schedule.decay", draft["lr_decay_steps"], "--lr_decay_steps")
    else:
        draft.refuse("--lr_decay_steps", "warmup_stable_decay needs the length of its decay", "add --lr_decay_steps 10%")


def _piecewise(draft: Draft, extra: dict[str, Any]) -> None:
    rules = extra.pop("step_rules", "")
    if not rules:
        fix = "add --lr_scheduler_args \"step_rules='1:500,0.1'\""
        draft.refuse("--lr_scheduler_args", "piecewise_constant needs its rules", fix)
    draft.put("schedule.rules", str(rules), "--lr_scheduler_args")


NUMBERS = {
    "cosine_with_restarts": _cycles,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_floor,
    "warmup_stable_decay": _stable,
    "piecewise_constant": _piecewise,
}


def _foreign_schedule(draft: Draft) -> None:
    name, where = draft["lr_scheduler_type"], draft.where("lr_scheduler_type")
    if where != "--lr_scheduler_type":
        draft.refuse(where, f"{name} would run code that a file names", f"give it on the command line: --lr_scheduler_type {name}")
    if draft["lr_warmup_steps"]:
        draft.refuse(draft.where("lr_warmup_steps"), f"{name} has no warm-up", "leave --lr_warmup_steps out")
    draft.put("schedule.name", "imported", "--lr_scheduler_type")
    draft.put("schedule.class", name if "." in name else f"torch.optim.lr_scheduler.{name}", "--lr_scheduler_type")
    options = key_values(draft, "lr_scheduler_args")
    if options:
        draft.put("schedule.options", options, "--lr_scheduler_args")
