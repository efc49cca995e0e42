"""The report before the first step: what it counts, what it says, and when a run may start."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.config.schema import ValidationConfig
from fluxsmith.data.batching import Member, epoch_batches
from fluxsmith.data.checks import ScanReport, check_fits, report_on
from fluxsmith.data.scan import scan
from fluxsmith.data.sources.folder import Config
from fluxsmith.data.types import Size
from fluxsmith.errors import ConfigError, DataError


def words(caption: str) -> dict[str, tuple[int, int]]:
    """A tokenizer that counts words."""
    return {"clip_l": (len(caption.split()), 3), "t5xxl": (len(caption.split()), 6)}


def report(folder: Path, **options: Any) -> ScanReport:
    return report_on(scan([Config(path=folder, **({"resolution": 64, "buckets": {"step": 16, "min": 32}} | options))]), token_counts=words)


def said(found: ScanReport, kind: str) -> list[str]:
    return [str(finding.problem) for dataset in found.datasets for finding in dataset.of(kind)]


pytestmark = pytest.mark.ledger("FS-07")


def test_a_clean_folder_has_counts_and_no_findings(folder: Path) -> None:
    found = report(folder, batch_size=2, repeats=3)
    dataset = found.datasets[0]
    assert (dataset.found, dataset.usable, dataset.with_caption, dataset.findings) == (6, 6, 6, ())
    assert {row.bucket: (row.pictures, row.batches) for row in dataset.buckets} == {
        Size(48, 80): (1, 2),
        Size(64, 64): (2, 3),
        Size(80, 48): (3, 5),
    }
    assert found.is_startable
    found.raise_if_unusable()


def test_tokens_are_counted_per_encoder_and_cut_captions_listed(folder: Path) -> None:
    (folder / "00.txt").write_text("one two three four")
    (folder / "01.txt").write_text("one two three four five six seven")
    rows = {row.encoder: row for row in report(folder).datasets[0].tokens}
    assert rows["clip_l"].over == ("00.png", "01.png")
    assert rows["t5xxl"].over == ("01.png",)
    assert (rows["t5xxl"].limit, rows["t5xxl"].longest) == (6, 7)
    assert [line for line in said(report(folder), "warning") if "caption is cut" in line and "01.txt" in line]


def test_a_missing_caption_stops_the_run_unless_told_otherwise(folder: Path) -> None:
    (folder / "02.txt").unlink()
    with pytest.raises(DataError) as caught:
        report(folder).raise_if_unusable()
    assert caught.value.exit_code == 3
    assert any("02.png" in line and 'captions.missing = "allow"' in line for line in caught.value.lines())
    skipped = report(folder, captions={"missing": "skip"})
    assert skipped.is_startable
    assert skipped.datasets[0].usable == 5
    sets = scan([Config(path=folder, resolution=64, buckets={"step": 16}, captions={"missing": "allow", "trigger": "zxcat"})])
    assert [item.caption for item in sets[0].items if item.record.key == "02.png"] == ["zxcat"]


def test_empty_captions_follow_their_option(folder: Path) -> None:
    (folder / "02.txt").write_bytes(b"")
    allowed = report(folder)
    assert allowed.is_startable
    assert any("caption is empty" in line for line in said(allowed, "warning"))
    assert not report(folder, captions={"empty": "error"}).is_startable
    assert report(folder, captions={"empty": "skip"}).datasets[0].usable == 5


@pytest.mark.parametrize(
    ("bad", "max_skipped", "starts"), [(1, 0.1, True), (2, 0.1, False), (2, 0.2, True), (10, 1.0, False), (9, 1.0, True)]
)
def test_the_share_of_skipped_pictures_decides(
    make_folder: Callable[..., Path], tmp_path: Path, bad: int, max_skipped: float, starts: bool
) -> None:
    folder = make_folder(tmp_path / "ten", 10)
    for number in range(bad):
        (folder / f"{number:02d}.png").write_bytes(b"broken")
    found = report(folder, max_skipped=max_skipped)
    assert found.is_startable == starts
    assert len(said(found, "skipped")) == bad
    if not starts:
        with pytest.raises(DataError) as caught:
            found.raise_if_unusable()
        assert len(caught.value.problems) == bad + 1
        assert all(f"{number:02d}.png" in "\n".join(caught.value.lines()) for number in range(bad))
    else:
        assert len([line for line in found.warnings() if line.startswith("skipped: ")]) == bad


def test_copies_enlarged_pictures_and_extra_lines_are_named(folder: Path, picture: Callable[..., Path]) -> None:
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "copy.txt").write_text("one\ntwo")
    picture(folder / "tiny.png", (20, 20))
    (folder / "tiny.txt").write_text("[trigger]")
    lines = said(report(folder), "warning")
    assert any("several times" in line and "00.png = copy.png" in line for line in lines)
    assert any("enlarged" in line and "20 x 20 to 64 x 64" in line for line in lines)
    assert any("first line" in line and "copy.txt" in line for line in lines)
    assert any("[trigger]" in line and "tiny.txt" in line for line in lines)
    assert not any("first line" in line for line in said(report(folder, captions={"wildcards": True}), "warning"))


def test_without_enlarging_pictures_below_a_step_are_skipped_with_the_cure(folder: Path, picture: Callable[..., Path]) -> None:
    picture(folder / "tiny.png", (40, 12))
    (folder / "tiny.txt").write_text("tiny")
    lines = said(report(folder, buckets={"step": 16, "upscale": False}, max_skipped=0.5), "skipped")
    assert len(lines) == 1
    assert "tiny.png" in lines[0]
    assert "40 x 12" in lines[0]
    assert "buckets.upscale = true" in lines[0]


def test_many_warnings_of_a_kind_are_gathered(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "small", 20, sizes=[(30, 30), (20, 31)])
    lines = report(folder).warnings()
    assert len([line for line in lines if "enlarged" in line]) == 1
    assert "20 pictures" in lines[0]
    assert "15 more" in lines[0]


def test_all_folders_that_cannot_be_read_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        scan([Config(path=tmp_path / "one"), Config(path=tmp_path / "two")])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"buckets": {"step": 8}}, "buckets.step = 16"),
        ({"buckets": {"step": 40}}, "buckets.step = 32"),
        ({"buckets": {"step": 64}, "resolution": 48}, "buckets.step = 48"),
        ({"buckets": {"enabled": False}, "resolution": 500}, "resolution = [496, 496]"),
        ({"buckets": {"step": 16}, "resolution": 8}, "resolution to at least 16"),
    ],
)
def test_buckets_that_cannot_exist_are_refused_with_the_cure(folder: Path, options: dict[str, Any], cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scan([Config(path=folder, **options)])
    assert cure in str(caught.value)


def test_the_report_is_json(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"x")
    record = json.loads(json.dumps(report(folder).as_record()))
    assert record["is_startable"] is False
    dataset = record["datasets"][0]
    assert dataset["findings"][0]["kind"] == "skipped"
    assert dataset["findings"][0]["problem"]["where"].endswith("bad.png")
    assert dataset["buckets"][0] == {"bucket": {"width": 48, "height": 80}, "pictures": 1, "batches": 1}


def batches(count: int, batch_size: int, repeats: int = 1) -> list[Any]:
    return epoch_batches([Member(0, tuple(range(count)), (Size(64, 64),) * count, batch_size, repeats)], seed=0, epoch=0)


@pytest.mark.ledger("ST-41")
def test_too_few_pictures_are_reported_with_the_numbers_and_the_cure() -> None:
    lines = check_fits(batches(3, 8), [8], accumulation=4)
    assert any("1 micro-batches" in line and "takes 4" in line and "repeats = 4" in line and "accumulation = 1" in line for line in lines)
    assert any("batch of 8" in line and "batch_size = 3" in line and "repeats = 3" in line for line in lines)
    assert any("4 processes" in line for line in check_fits(batches(3, 1), [1], accumulation=1, world=4))


@pytest.mark.ledger("ST-41")
def test_following_the_cure_ends_the_warning() -> None:
    assert check_fits(batches(3, 3), [3], accumulation=1) == []
    assert check_fits(batches(3, 8, repeats=3 * 4), [8], accumulation=4) == []
    assert check_fits(batches(16, 2), [2], accumulation=4, world=2) == []


@pytest.mark.ledger("ST-41")
def test_an_epoch_without_a_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="validation.share"):
        check_fits([], [1], accumulation=1)


@pytest.mark.ledger("ST-41")
def test_one_picture_and_a_large_batch_still_train(workshop: Any, make_folder: Callable[..., Path], tmp_path: Path) -> None:
    data = workshop.prepare(workshop.config(make_folder(tmp_path / "one", 1), batch_size=8))
    assert [len(spec.uses) for spec in data.batches(0)] == [1]
    assert check_fits(data.batches(0), data.batch_sizes, accumulation=1)


def test_several_lines_are_no_surprise_when_only_the_first_is_meant(folder: Path) -> None:
    (folder / "00.txt").write_text("a cat\nphoto by someone")
    assert [line for line in said(report(folder), "warning") if "only the first line" in line and "first_line = true" in line]
    assert not said(report(folder, captions={"first_line": True}), "warning")


def test_what_is_special_about_a_dataset_is_in_its_verdict(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"resolution": 64, "buckets": {"step": 16, "min": 32}, "batch_size": 2}
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in folder.glob("*.png"):
        (masks / path.name).write_bytes(path.read_bytes())
    configs = [
        Config(path=folder, name="one", group="g", mask_dir=masks, condition_dir=masks, repeats=2, **options),
        Config(path=folder, name="two", group="g", regularisation=True, condition_dir=masks, **options),
        Config(path=folder, name="three", validation_share=0.0, **options),
    ]
    found = report_on(scan(configs), validation=ValidationConfig(share=0.4))
    one, two, three = found.datasets
    assert one.verdict() == 'one: 6 found, 6 usable, group "g", 6 with a mask, 6 with a condition picture, 2 held out'
    assert two.verdict() == 'two: 6 found, 6 usable, group "g", regularisation, 6 with a condition picture'
    assert three.verdict() == "three: 6 found, 6 usable"
    assert {row.bucket: (row.pictures, row.batches) for row in one.buckets}[Size(64, 64)] == (2, 3), "2 x 2 uses and 2 of the other set"
    assert {row.bucket: (row.pictures, row.batches) for row in three.buckets}[Size(64, 64)] == (2, 1)
    record = json.loads(json.dumps(found.as_record()))["datasets"]
    assert [(one["group"], one["masks"], one["held_out"]) for one in record] == [("g", 6, 2), ("g", None, 0), ("", None, 0)]


def test_no_columns_for_what_is_not_used(folder: Path) -> None:
    assert report(folder).datasets[0].traits() == []
