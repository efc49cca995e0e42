"""Buckets equal sd-scripts to the pixel: 200 picture sizes under 36 settings (fixture `bucketing`)."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fluxsmith.data.buckets import BucketRule
from fluxsmith.data.types import Size

SETTINGS = [
    f"sd_scripts/res{width}x{height}_steps{step}_{limits}"
    for width, height in ((512, 512), (768, 768), (1024, 1024), (1024, 768))
    for step in (64, 32, 16)
    for limits in ("min256_max1024", "min512_max2048", "noupscale")
]


@pytest.fixture(scope="module")
def bucketing(fixtures_root: Path) -> tuple[dict, dict, dict]:
    folder = fixtures_root / "bucketing"
    meta = json.loads((folder / "meta.json").read_text())
    return meta, load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")


def test_all_sd_scripts_settings_of_the_fixture_are_covered(bucketing: tuple[dict, dict, dict]) -> None:
    meta, _, _ = bucketing
    assert sorted(SETTINGS) == sorted(name for name in meta["settings"] if name.startswith("sd_scripts/"))


@pytest.mark.ledger("KS-38")
@pytest.mark.parametrize("name", SETTINGS)
def test_buckets_sizes_and_crops_equal_sd_scripts(name: str, bucketing: tuple[dict, dict, dict]) -> None:
    meta, inputs, expected = bucketing
    setting = meta["settings"][name]
    rule = BucketRule(
        Size(*setting["resolution"]),
        upscale=not setting["bucket_no_upscale"],
        shortest=setting["min_bucket_reso"] or 0,
        longest=setting["max_bucket_reso"] or 0,
        step=setting["bucket_reso_steps"],
    )
    if rule.upscale:
        assert [list(bucket) for bucket in rule.buckets] == expected[f"{name}/all_resolutions"].tolist()
    rows, errors = [], []
    for width, height in inputs["sizes"].tolist():
        placed = rule.place(Size(width, height))
        assert placed is not None
        rows.append([*placed.bucket, *placed.resized, placed.x, placed.y])
        errors.append(placed.bucket.width / placed.bucket.height - width / height)
    assert rows == expected[f"{name}/bucket"].tolist()
    assert sorted({tuple(row[:2]) for row in rows}) == [tuple(row) for row in expected[f"{name}/used_resolutions_sorted"].tolist()]
    assert torch.allclose(torch.tensor(errors), expected[f"{name}/ar_error"], atol=meta["tolerance"]["ar_error"], rtol=0)


def test_the_closest_aspect_is_found_for_every_size() -> None:
    """The sorted search gives what a search through all buckets would."""
    rule = BucketRule(Size(1024, 1024), shortest=256, longest=2048, step=64)
    for width in range(300, 3000, 137):
        for height in range(300, 3000, 149):
            size = Size(width, height)
            errors = [abs(b.width / b.height - width / height) for b in rule.buckets]
            placed = rule.place(size)
            assert placed is not None
            assert placed.bucket == rule.buckets[errors.index(min(errors))] or size in rule.buckets
            assert math.isclose(min(errors), abs(placed.bucket.width / placed.bucket.height - width / height))
