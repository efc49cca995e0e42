"""What of a dataset shapes its samples: the options and pictures that go into the digest by which a resumed run knows its data.

Equal digests, equal data. Options that came later are left out while they are off, so that older runs can be continued.
"""

from collections.abc import Sequence
from typing import Any

from fluxsmith.config.dataset import CaptionConfig, DatasetConfig
from fluxsmith.data.scan import Item

NOT_SHAPING = {
    "type",
    "path",
    "metadata_file",
    "name",
    "recursive",
    "max_pixels",
    "max_skipped",
}  # options that do not change what a picture becomes
LATER = (
    *("group", "color_aug", "face_crop", "alpha_mask", "mask_dir", "condition_dir", "preserve"),
    *("validation_share", "validation_seed"),
)
LATER_CAPTIONS = ("first_line", "shuffle_affixes")


def shaping(config: DatasetConfig) -> dict[str, Any]:
    """The options that change what a sample is."""
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_SHAPING}
    for name in LATER:
        if settings[name] == DatasetConfig.model_fields[name].default:
            del settings[name]
    for name in LATER_CAPTIONS:
        if settings["captions"][name] == CaptionConfig.model_fields[name].default:
            del settings["captions"][name]
    for name in ("mask_dir", "condition_dir"):  # the folder may move: what is in it counts
        if name in settings:
            settings[name] = True
    return settings


def rows(items: Sequence[Item]) -> list[tuple[Any, ...]]:
    """What each sample is made from."""
    listed = []
    for item in items:
        row = (item.record.key.encode("utf-8", "surrogateescape").hex(), item.digest, item.size, item.caption)
        others = [companion.digest if companion else None for companion in (item.mask, item.condition)]
        listed.append((*row, *others) if any(others) else row)
    return listed
