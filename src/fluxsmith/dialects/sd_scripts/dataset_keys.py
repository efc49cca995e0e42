"""The keys of sd-scripts' dataset file: at which level each may stand, of which type it is, and which option gives its default.

Letters of levels: g `[general]`, d `[[datasets]]`, s `[[datasets.subsets]]`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fluxsmith.dialects.arguments import nearest
from fluxsmith.dialects.base import Draft
from fluxsmith.dialects.sd_scripts.options import TextFile
from fluxsmith.errors import Problem

LEVELS = {"g": "[general]", "d": "[[datasets]]", "s": "[[datasets.subsets]]"}
FILTERS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


class Key(NamedTuple):
    """One key; `option` is the command line option behind it, where the names differ."""

    levels: str
    kind: str
    option: str = ""
    default: Any = None


KEYS: dict[str, Key] = {
    "batch_size": Key("gd", "count", "train_batch_size", 1),
    "resolution": Key("gd", "size"),
    "enable_bucket": Key("gd", "bool", default=False),
    "min_bucket_reso": Key("gd", "count", default=256),
    "max_bucket_reso": Key("gd", "count", default=1024),
    "bucket_reso_steps": Key("gd", "count", default=64),
    "bucket_no_upscale": Key("gd", "bool", default=False),
    "validation_split": Key("gds", "share", default=0.0),
    "validation_seed": Key("gds", "int"),
    "network_multiplier": Key("gd", "float"),
    "resize_interpolation": Key("gds", "filter"),
    "interpolation_type": Key("gds", "filter"),
    "num_repeats": Key("gds", "int", "dataset_repeats", 1),
    "shuffle_caption": Key("gds", "bool", default=False),
    "caption_separator": Key("gds", "text", default=","),
    "keep_tokens": Key("gds", "int", default=0),
    "keep_tokens_separator": Key("gds", "text", default=""),
    "secondary_separator": Key("gds", "text"),
    "enable_wildcard": Key("gds", "bool", default=False),
    "caption_prefix": Key("gds", "text"),
    "caption_suffix": Key("gds", "text"),
    "caption_dropout_rate": Key("gds", "share", default=0.0),
    "caption_dropout_every_n_epochs": Key("gds", "int", default=0),
    "caption_tag_dropout_rate": Key("gds", "share", default=0.0),
    "token_warmup_min": Key("gds", "count", default=1),
    "token_warmup_step": Key("gds", "float", default=0),
    "color_aug": Key("gds", "bool", default=False),
    "flip_aug": Key("gds", "bool", default=False),
    "random_crop": Key("gds", "bool", default=False),
    "face_crop_aug_range": Key("gds", "range"),
    "custom_attributes": Key("gds", "table"),
    "caption_extension": Key("gds", "text", default=".caption"),
    "class_tokens": Key("gds", "text"),
    "cache_info": Key("gds", "bool"),
    "image_dir": Key("s", "text"),
    "is_reg": Key("s", "bool"),
    "alpha_mask": Key("s", "bool", default=False),
    "metadata_file": Key("s", "text"),
    "conditioning_data_dir": Key("s", "text"),
}
ELSEWHERE = {  # keys that people write into the file, and where they belong
    "prior_loss_weight": "give --prior_loss_weight on the command line",
    "cache_latents": "give --cache_latents on the command line",
    "cache_latents_to_disk": "give --cache_latents_to_disk on the command line",
    "debug_dataset": "leave it out; `fluxsmith data scan` shows the data",
    "max_token_length": "give --t5xxl_max_token_length on the command line",
}


def check_keys(draft: Draft, file: TextFile, table: Any, level: str, path: tuple[str | int, ...]) -> dict[str, Any]:
    """The values of one table, those that cannot be used refused. `path` is where the table stands."""
    found: dict[str, Any] = {}
    if not isinstance(table, Mapping):
        draft.refuse(file.place(*path), f"{LEVELS[level]} is not a table", f"write {LEVELS[level]} with keys below it")
        return found
    for name, value in table.items():
        if level == "d" and name == "subsets":
            continue
        problem = _problem(name, value, level)
        if problem:
            draft.problems.append(Problem(problem.what, file.place(*path, name), problem.why, problem.fix))
        else:
            found[name] = value
    if "interpolation_type" in found:
        found.setdefault("resize_interpolation", found["interpolation_type"])
    return found


def _problem(name: str, value: Any, level: str) -> Problem | None:
    key = KEYS.get(name)
    if key is None:
        if name in ELSEWHERE:
            return Problem(f"{name} does not belong into this file", fix=ELSEWHERE[name])
        close = nearest(name, [known for known, row in KEYS.items() if level in row.levels])
        fix = f"write {close}" if close else "leave it out"
        return Problem(f"{name} is no key of {LEVELS[level]}", fix=fix)
    if level not in key.levels:
        places = " or ".join(LEVELS[letter] for letter in key.levels)
        return Problem(f"{name} does not belong into {LEVELS[level]}", fix=f"move it to {places}")
    wanted = wrong_kind(key.kind, value)
    return Problem(f"{name} = {value!r} is not {wanted}", fix=f"give {wanted}") if wanted else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list) else [value]
    return len(sides) in (1, 2) and all(_is_int(side) and side > 0 for side in sides)


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


KINDS = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "text": (lambda value: isinstance(value, str), "text"),
    "int": (_is_int, "a whole number"),
    "count": (lambda value: _is_int(value) and value > 0, "a whole number above 0"),
    "float": (_is_number, "a number"),
    "share": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "size": (_is_size, "one side or [width, height] in pixels"),
    "range": (_is_range, "two numbers, [smaller, larger]"),
    "filter": (lambda value: value in FILTERS, f"one of {', '.join(FILTERS)}"),
    "table": (lambda value: isinstance(value, Mapping), "a table"),
}


def wrong_kind(kind: str, value: Any) -> str:
    """What is expected where the value does not fit; empty where it does."""
    fits, words = KINDS[kind]
    return "" if fits(value) else words


def from_options(draft: Draft, name: str) -> Any:
    """The value that the command line gives a key, or sd-scripts' default."""
    key = KEYS[name]
    option = key.option or name
    if name == "caption_extension" and draft.has("caption_extention"):
        return draft["caption_extention"]
    value = draft[option] if option in draft.rows else None
    return key.default if value is None else value
