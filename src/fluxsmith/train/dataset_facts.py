"""What a run's weights say about its pictures, in sd-scripts' form: one entry a dataset, its folders as subsets."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fluxsmith.data.scan import ScannedSet


def dataset_entries(sets: Sequence[ScannedSet]) -> list[dict[str, Any]]:
    """ss_datasets: datasets that share batches (a group) are one entry."""
    groups: dict[str, list[ScannedSet]] = {}
    for one in sets:
        groups.setdefault(one.config.group or f"#{one.index}", []).append(one)
    return [_entry(members) for members in groups.values()]


def _entry(members: Sequence[ScannedSet]) -> dict[str, Any]:
    config, side = members[0].config, members[0].config.resolution
    buckets = Counter(item.placement.bucket for one in members for item in one.items)
    return {
        "is_dreambooth": all(one.config.model_dump()["type"] == "folder" for one in members),
        "batch_size_per_device": config.batch_size,
        "num_train_images": sum(len(one.items) * one.config.repeats for one in members),
        "num_reg_images": sum(len(one.items) for one in members if one.config.regularisation),
        "resolution": list(side) if isinstance(side, tuple) else [side, side],
        "enable_bucket": config.buckets.enabled,
        "min_bucket_reso": config.buckets.min,
        "max_bucket_reso": config.buckets.max,
        "resize_interpolation": _filter(members[0]),
        "tag_frequency": {one.name: tags(one) for one in members},
        "bucket_info": {
            "buckets": {str(i): {"resolution": list(bucket), "count": count} for i, (bucket, count) in enumerate(sorted(buckets.items()))}
        },
        "subsets": [_subset(one) for one in members],
    }


def _subset(one: ScannedSet) -> dict[str, Any]:
    config, captions = one.config, one.config.captions
    return {
        "img_count": len(one.items),
        "num_repeats": config.repeats,
        "color_aug": config.color_aug or config.color_jitter > 0,
        "flip_aug": config.flip,
        "random_crop": config.crop == "random",
        "shuffle_caption": captions.shuffle,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_separator or None,
        "secondary_separator": captions.secondary_separator or None,
        "enable_wildcard": captions.wildcards,
        "caption_prefix": captions.prefix or None,
        "caption_suffix": captions.suffix or None,
        "resize_interpolation": _filter(one),
        "image_dir": one.name,
        "class_tokens": captions.trigger or None,
        "is_reg": config.regularisation,
    }


def _filter(one: ScannedSet) -> str | None:
    return None if one.config.interpolation == "auto" else one.config.interpolation


def tags(one: ScannedSet) -> dict[str, int]:
    """Lower-cased tag -> count over the captions."""
    found = (tag.strip().lower() for item in one.items for tag in item.caption.split(one.config.captions.separator))
    return dict(Counter(tag for tag in found if tag))


def caption_options(sets: Sequence[ScannedSet]) -> dict[str, Any]:
    """The rates of all datasets, where they agree; the weight of regularisation pictures."""
    options: dict[str, Any] = {}
    for name, values in (
        ("caption_dropout_rate", {one.config.captions.dropout for one in sets}),
        ("caption_dropout_every_n_epochs", {one.config.captions.dropout_every_epochs for one in sets}),
        ("caption_tag_dropout_rate", {one.config.captions.tag_dropout for one in sets}),
        ("resize_interpolation", {_filter(one) for one in sets}),
        ("prior_loss_weight", {one.config.weight for one in sets if one.config.regularisation}),
    ):
        if len(values) == 1:
            options[name] = values.pop()
    return options
