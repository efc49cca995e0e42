"""What a digest of data names: every option that shapes a sample, and nothing that older runs did not have while it is off."""

from pathlib import Path
from typing import Any

import pytest

from fluxsmith.data.shape import LATER, LATER_CAPTIONS, shaping
from fluxsmith.data.sources.folder import Config
from fluxsmith.data.sources.metadata import Config as MetadataConfig

FIRST = {  # options of the first version, by which its runs know their data
    *("resolution", "batch_size", "repeats", "buckets", "captions", "crop", "flip", "color_jitter", "interpolation", "background"),
    *("regularisation", "weight"),
}
FIRST_CAPTIONS = {
    *("extensions", "missing", "empty", "encoding", "trigger", "prefix", "suffix", "separator", "secondary_separator", "shuffle"),
    *("keep_tokens", "keep_separator", "wildcards", "dropout", "dropout_every_epochs", "tag_dropout", "warmup_min", "warmup_steps"),
}


@pytest.mark.parametrize("config", [Config(path=Path("cats")), MetadataConfig(metadata_file=Path("cats.json"))], ids=["folder", "metadata"])
def test_options_that_came_later_are_left_out_while_they_are_off(config: Any) -> None:
    settings = shaping(config)
    assert set(settings) == FIRST
    assert set(settings["captions"]) == FIRST_CAPTIONS


CHANGES: list[dict[str, Any]] = [
    {"group": "g"},
    {"color_aug": True},
    {"face_crop": (1.0, 2.0)},
    {"alpha_mask": True},
    {"mask_dir": Path("masks")},
    {"condition_dir": Path("edges")},
    {"preserve": True},
    {"validation_share": 0.1},
    {"validation_seed": 3},
    {"captions": {"first_line": True}},
    {"captions": {"shuffle_affixes": True}},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_later_option_counts_once_it_is_on(change: dict[str, Any]) -> None:
    assert shaping(Config(path=Path("cats"), **change)) != shaping(Config(path=Path("cats")))


def test_the_changes_cover_the_later_options() -> None:
    assert {name for change in CHANGES for name in change if name != "captions"} == set(LATER)
    assert {name for change in CHANGES for name in change.get("captions", {})} == set(LATER_CAPTIONS)


def test_where_folders_are_does_not_count() -> None:
    first = Config(path=Path("a"), mask_dir=Path("a-masks"), condition_dir=Path("x"))
    assert shaping(first) == shaping(Config(path=Path("b"), mask_dir=Path("b-masks"), condition_dir=Path("y"), name="b"))
