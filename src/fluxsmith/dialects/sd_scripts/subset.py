"""One subset of sd-scripts -> one entry of `[[data]]`: sizes, captions, augmentation, masks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fluxsmith.dialects.base import Draft

FILTERS = {"linear": "bilinear", "cubic": "bicubic"}
MULTIPLE = 16
VARYING = ("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate", "token_warmup_step")  # such captions differ from use to use


class Values(Protocol):
    """The values of a subset by inheritance, and its own table."""

    @property
    def own(self) -> Mapping[str, Any]: ...

    def __getitem__(self, name: str) -> Any: ...


def entry(draft: Draft, values: Values, *, where: str, group: str) -> dict[str, Any] | None:
    """The entry; None for a subset that sd-scripts leaves out. What cannot be done is refused in the draft."""
    if values["num_repeats"] < 1:
        draft.note(where, f"left out: num_repeats = {values['num_repeats']}")
        return None
    made = _source(draft, values, where)
    if made is None:
        return None
    if group:
        made["group"] = group
    made |= {"resolution": _resolution(draft, values, where), "batch_size": values["batch_size"], "repeats": values["num_repeats"]}
    made["buckets"] = _buckets(draft, values, made["resolution"], where)
    made["captions"] = captions(draft, values, where)
    made |= _pictures(draft, values, where)
    made |= _roles(draft, values, where)
    for name in ("cache_info",):
        if values[name]:
            draft.note(where, f"{name} has no effect: pictures are listed anew at every start")
    if values["network_multiplier"] not in (None, 1, 1.0):
        draft.note(where, "network_multiplier has no effect, in sd-scripts neither")
    return made


def _source(draft: Draft, values: Values, where: str) -> dict[str, Any] | None:
    file, folder = values.own.get("metadata_file"), values.own.get("image_dir")
    if file:
        return {"type": "metadata", "metadata_file": file, **({"path": folder} if folder else {})}
    if not folder:
        draft.refuse(where, "image_dir is missing", 'add image_dir = "path/to/pictures"')
        return None
    return {"type": "folder", "path": folder}


def _resolution(draft: Draft, values: Values, where: str) -> int | list[int]:
    given = values["resolution"]
    if given is None:
        draft.refuse(where, "the resolution is missing", "add resolution = 1024 to [general] (or --resolution 1024)")
        return 1024
    if isinstance(given, str):
        try:
            given = [int(part) for part in given.split(",")]
        except ValueError:
            given = []
    sides = given if isinstance(given, list) else [given]
    if len(sides) not in (1, 2) or any(side < 1 for side in sides):
        draft.refuse(draft.where("resolution"), f"--resolution {draft['resolution']} is no size", "write 1024 or 1024,768")
        return 1024
    return sides[0] if len(sides) == 1 or sides[0] == sides[1] else sides


def _buckets(draft: Draft, values: Values, resolution: int | list[int], where: str) -> dict[str, Any]:
    sides = resolution if isinstance(resolution, list) else [resolution]
    step = values["bucket_reso_steps"]
    if not values["enable_bucket"]:
        if any(side % MULTIPLE for side in sides):
            draft.refuse(where, f"resolution {resolution} is not a multiple of {MULTIPLE}", "change it, or add enable_bucket = true")
        return {"enabled": False}
    if step % MULTIPLE:
        draft.refuse(where, f"bucket_reso_steps = {step}", f"give a multiple of {MULTIPLE}: 16, 32 or 64")
        return {"enabled": True}
    low, high = values["min_bucket_reso"] // step * step, -(-values["max_bucket_reso"] // step) * step
    if max(sides) > high and not values["bucket_no_upscale"]:
        draft.refuse(where, f"resolution {resolution} is above max_bucket_reso = {high}", f"write max_bucket_reso = {2 * max(sides)}")
    if min(sides) < low:
        draft.note(where, f"min_bucket_reso = {low} is above the resolution, and is lowered to it")
    made: dict[str, Any] = {"enabled": True, "min": max(low, MULTIPLE), "max": max(high, low), "step": step}
    return made | ({"upscale": False} if values["bucket_no_upscale"] else {})


def captions(draft: Draft, values: Values, where: str) -> dict[str, Any]:
    """Caption options under their native names; only what differs from sd-scripts' defaults is written out, but for the file's form."""
    extension = values["caption_extension"]
    made: dict[str, Any] = {"missing": "allow", "empty": "error", "first_line": not values["enable_wildcard"]}
    if "metadata_file" not in values.own:
        made["extensions"] = [extension if extension.startswith(".") else f".{extension}"]
    plain = {
        "trigger": values["class_tokens"] or "",
        "prefix": values["caption_prefix"] or "",
        "suffix": values["caption_suffix"] or "",
        "secondary_separator": values["secondary_separator"] or "",
        "keep_separator": values["keep_tokens_separator"] or "",
        "keep_tokens": values["keep_tokens"],
        "shuffle": values["shuffle_caption"],
        "wildcards": values["enable_wildcard"],
        "dropout": float(values["caption_dropout_rate"]),
        "dropout_every_epochs": values["caption_dropout_every_n_epochs"],
        "tag_dropout": float(values["caption_tag_dropout_rate"]),
        "warmup_steps": values["token_warmup_step"],
    }
    made |= {key: value for key, value in plain.items() if value}
    if values["caption_prefix"] or values["caption_suffix"]:
        made["shuffle_affixes"] = True  # its document: shuffling takes them in
    if values["caption_separator"] != ",":
        made["separator"] = values["caption_separator"]
    if values["token_warmup_step"]:
        made["warmup_min"] = values["token_warmup_min"]
    if draft["cache_text_encoder_outputs"] or draft["cache_text_encoder_outputs_to_disk"]:
        for name in VARYING:
            if values[name]:
                fix = f"drop {name}, or --cache_text_encoder_outputs"
                draft.refuse(where, f"{name} makes captions that cannot be cached", fix)
    return made


def _pictures(draft: Draft, values: Values, where: str) -> dict[str, Any]:
    """Augmentation and resizing."""
    made: dict[str, Any] = {}
    is_cached = draft["cache_latents"] or draft["cache_latents_to_disk"]
    if values["random_crop"]:
        made["crop"] = "random"
    if values["flip_aug"]:
        made["flip"] = True
    if values["color_aug"]:
        made["color_aug"] = True
    for name in ("color_aug", "random_crop"):
        if values[name] and is_cached:
            draft.refuse(where, f"{name} and cached latents exclude each other", f"drop {name}, or --cache_latents")
    faces = _range(draft, values["face_crop_aug_range"], where)
    if faces:
        made["face_crop"] = faces
        if values["enable_bucket"]:
            draft.refuse(where, "face_crop_aug_range needs one size for all pictures", "drop it, or enable_bucket")
    filter_ = values["resize_interpolation"] or values["interpolation_type"]
    if filter_:
        made["interpolation"] = FILTERS.get(filter_, filter_)
    return made


def _range(draft: Draft, given: Any, where: str) -> list[float] | None:
    """`2.0,4.0` of the command line, or two numbers of the file."""
    if given is None or isinstance(given, list):
        return given
    try:
        low, high = (float(part) for part in given.split(","))
    except ValueError:
        draft.refuse(where, f"--face_crop_aug_range {given}", "write two numbers, as 2.0,4.0")
        return None
    return [low, high]


def _roles(draft: Draft, values: Values, where: str) -> dict[str, Any]:
    """Regularisation, validation, preservation, masks and condition pictures."""
    made: dict[str, Any] = {}
    if values["is_reg"]:
        made |= {"regularisation": True, "weight": 1.0 if draft["prior_loss_weight"] is None else draft["prior_loss_weight"]}
    elif values["validation_split"] and "network_module" in draft.rows:
        made["validation_share"] = float(values["validation_split"])
        if values["validation_seed"] is not None:
            made["validation_seed"] = values["validation_seed"]
    elif values["validation_split"]:
        draft.note(where, "validation_split has no effect: this trainer measures no validation loss")
    attributes = values["custom_attributes"] or {}
    if attributes.get("diff_output_preservation"):
        made["preserve"] = True
    for name in set(attributes) - {"diff_output_preservation"}:
        draft.note(where, f"custom_attributes.{name} has no effect")
    if values["alpha_mask"]:
        made["alpha_mask"] = True
    return made | _condition(draft, values, where)


def _condition(draft: Draft, values: Values, where: str) -> dict[str, Any]:
    """A folder of masks with --masked_loss; a folder of condition pictures in the ControlNet trainer."""
    folder = values.own.get("conditioning_data_dir")
    trains_control = draft.script == "flux_train_control_net"
    if trains_control:
        if not folder:
            draft.refuse(where, "condition pictures are missing", 'add conditioning_data_dir = "path/to/conditions"')
        return {"condition_dir": folder} if folder else {}
    if not folder:
        return {}
    if not draft["masked_loss"]:
        draft.refuse(where, "conditioning_data_dir is for masks here", "add --masked_loss, or drop it")
        return {}
    if not Path(folder).name:
        draft.refuse(where, "conditioning_data_dir is empty", "give the folder of the masks")
    return {"mask_dir": folder}
