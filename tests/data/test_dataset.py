"""Prepared data: what a run trains on is the same in any order, thread and process; caches notice every change."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxsmith.config.schema import ValidationConfig
from fluxsmith.data import loading as loading_module
from fluxsmith.data import scan as scan_module
from fluxsmith.data.types import Batch, Encoders
from fluxsmith.errors import ConfigError, DataError, NumericError, StorageError


def same(first: Batch, second: Batch) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, tuple) and a and isinstance(a[0], torch.Tensor):
            return all(equal(x, y) for x, y in zip(a, b, strict=True))
        return a == b

    return all(equal(a, b) for a, b in zip(first, second, strict=True))


def all_of(data: Any, epochs: int = 2) -> list[Batch]:
    return [data.load(spec, step=0) for epoch in range(epochs) for spec in data.batches(epoch)]


@pytest.mark.ledger("KS-25")
@pytest.mark.ledger("KS-24")
@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_batches_carry_what_the_encoders_gave(workshop: Any, folder: Path, kind: str) -> None:
    data = workshop.prepare(workshop.config(folder, batch_size=2), cache={"latents": kind, "text": kind})
    seen = set()
    for spec in data.batches(0):
        batch = data.load(spec, step=0)
        assert batch.pixels is None
        assert batch.latents.shape == (len(spec.uses), 16, spec.bucket.height // 8, spec.bucket.width // 8)
        assert batch.text.pooled[:, 0].tolist() == [len(caption) for caption in batch.captions]
        seen |= set(batch.keys)
    assert seen == {f"{number:02d}.png" for number in range(6)}
    assert workshop.encoders.pictures == 6


@pytest.mark.ledger("KS-24")
@pytest.mark.ledger("KS-25")
def test_the_second_start_encodes_nothing_and_gives_the_same(workshop: Any, folder: Path) -> None:
    config = workshop.config(folder, batch_size=2, flip=True, captions={"dropout": 0.4})
    first = all_of(workshop.prepare(config))
    assert workshop.encoders.pictures == 12
    data = workshop.prepare(config)
    assert (workshop.encoders.pictures, workshop.encoders.captions) == (0, [])
    assert data.cache_summary == ("latents cache: 12 valid", "text cache: 7 valid")
    assert all(same(a, b) for a, b in zip(first, all_of(data), strict=True))


@pytest.mark.ledger("KS-24")
@pytest.mark.ledger("KS-25")
def test_edited_pictures_and_captions_are_noticed(workshop: Any, folder: Path, picture: Callable[..., Path]) -> None:
    config = workshop.config(folder)
    before = workshop.prepare(config)
    picture(folder / "00.png", (100, 100), seed=99)
    picture(folder / "01.png", (160, 100), seed=98)
    (folder / "02.txt").write_text("another text")
    data = workshop.prepare(config)
    assert workshop.encoders.pictures == 2
    assert workshop.encoders.captions == ["another text"]
    assert data.cache_summary == (
        "latents cache: 4 valid, 2 stale (picture changed), rebuilt",
        "text cache: 5 valid, 1 stale (caption changed), rebuilt",
    )
    assert data.digest != before.digest


def test_a_change_that_leaves_size_and_time_alone_is_noticed_by_verify(workshop: Any, folder: Path) -> None:
    config = workshop.config(folder)
    path = folder / "03.png"
    path.write_bytes(path.read_bytes() + b"\0")
    workshop.prepare(config)
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "6 valid" in workshop.prepare(config).cache_summary[0], "the shortcut trusts size, time and inode"
    assert "1 stale (picture changed)" in workshop.prepare(config, cache={"verify": True}).cache_summary[0]
    assert workshop.encoders.pictures == 1


@pytest.mark.ledger("KS-25")
@pytest.mark.parametrize(
    "change",
    [{"interpolation": "bicubic"}, {"resolution": 96}, {"background": (0, 0, 0)}, {"crop": "random"}, {"buckets": {"enabled": False}}],
    ids=str,
)
def test_settings_that_shape_latents_are_part_of_the_key(workshop: Any, folder: Path, change: dict[str, Any]) -> None:
    first = workshop.prepare(workshop.config(folder))
    second = workshop.prepare(workshop.config(folder, **change))
    assert workshop.encoders.pictures > 0
    assert workshop.encoders.captions == []
    assert "not yet made with these settings" in second.cache_summary[0]
    assert first.digest != second.digest


def test_an_exchanged_encoder_is_noticed(workshop: Any, folder: Path) -> None:
    workshop.prepare(workshop.config(folder))
    workshop.encoders.digests = ("ae-2", "text-1")
    workshop.prepare(workshop.config(folder))
    assert (workshop.encoders.pictures, len(workshop.encoders.captions)) == (6, 0)


def test_moving_the_folder_keeps_the_digest(workshop: Any, folder: Path, tmp_path: Path) -> None:
    before = workshop.prepare(workshop.config(folder))
    folder.rename(tmp_path / "elsewhere")
    after = workshop.prepare(workshop.config(tmp_path / "elsewhere"))
    assert after.digest == before.digest
    assert workshop.encoders.pictures == 0


def test_loading_order_and_threads_do_not_matter(workshop: Any, folder: Path) -> None:
    config = workshop.config(
        folder,
        batch_size=2,
        flip=True,
        crop="random",
        color_jitter=0.5,
        repeats=3,
        captions={"shuffle": True, "dropout": 0.3, "tag_dropout": 0.2},
    )
    data = workshop.prepare(config, cache={"latents": "off", "text": "off"})
    specs = [spec for epoch in range(3) for spec in data.batches(epoch)]
    straight = [data.load(spec, step=0) for spec in specs]
    assert straight[0].pixels is not None
    assert straight[0].text is None
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda spec: data.load(spec, step=0), reversed(specs)))
    again = workshop.prepare(config, cache={"latents": "off", "text": "off"})
    resumed = [again.load(spec, step=0) for spec in again.batches(2)]
    assert all(same(a, b) for a, b in zip(straight, reversed(threaded), strict=True))
    assert all(same(a, b) for a, b in zip(straight[-len(resumed) :], resumed, strict=True))


def test_another_process_draws_the_same(workshop: Any, folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys, hashlib, torch\n"
        "from pathlib import Path\n"
        "from fluxsmith.config.schema import CacheConfig\n"
        "from fluxsmith.data.dataset import prepare\n"
        "from fluxsmith.data.sources.folder import Config\n"
        "from fluxsmith.data.types import Encoders\n"
        "from fluxsmith.events import Bus\n"
        "config = Config(path=Path(sys.argv[1]), resolution=64, batch_size=2, flip=True, buckets={'step': 16, 'min': 32},\n"
        "    captions={'shuffle': True})\n"
        "data = prepare([config], cache=CacheConfig(latents='off', text='off'), seed=7,\n"
        "    encoders=Encoders(None, '', None, ''), bus=Bus(), run_dir=Path(sys.argv[2]))\n"
        "h = hashlib.sha256(data.digest.encode())\n"
        "for epoch in range(2):\n"
        "    for spec in data.batches(epoch):\n"
        "        batch = data.load(spec, step=0)\n"
        "        h.update(repr((spec, batch.captions)).encode() + batch.pixels.numpy().tobytes())\n"
        "print(h.hexdigest())\n"
    )
    runs = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-c", script, str(folder), str(tmp_path / "run")]
        runs.append(subprocess.run(arguments, env=env, capture_output=True, text=True, check=True).stdout)
    assert runs[0] == runs[1]
    assert len(runs[0]) == 65


def test_flips_are_drawn_per_use_and_the_mirrored_latents_are_mirrored(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "one", 1)
    data = workshop.prepare(workshop.config(folder, flip=True, repeats=200))
    latents = [batch.latents for batch in all_of(data, 1)]
    mirrored = sum(not torch.equal(one, latents[0]) for one in latents)
    assert 60 < mirrored < 140
    assert any(torch.allclose(one, latents[0].flip(-1), atol=1e-6) for one in latents)


def test_dropped_captions_use_the_empty_text(workshop: Any, folder: Path) -> None:
    data = workshop.prepare(workshop.config(folder, repeats=50, captions={"dropout": 0.5}))
    captions = [caption for batch in all_of(data, 1) for caption in batch.captions]
    assert 100 < captions.count("") < 200
    assert "" in workshop.encoders.captions


@pytest.mark.ledger("KS-41")
@pytest.mark.parametrize(
    "options", [{"shuffle": True}, {"wildcards": True}, {"tag_dropout": 0.1}, {"warmup_steps": 10}, {"shuffle": True, "tag_dropout": 0.1}]
)
def test_captions_that_vary_cannot_be_cached(workshop: Any, folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        workshop.prepare(workshop.config(folder, captions=options))
    assert all(f"captions.{name}" in str(caught.value) for name in options)
    assert 'cache.text = "off"' in str(caught.value)
    workshop.prepare(workshop.config(folder, captions=options), cache={"text": "off"})


def test_colour_jitter_needs_uncached_latents(workshop: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r'cache.latents = "off"'):
        workshop.prepare(workshop.config(folder, color_jitter=0.2))


@pytest.mark.ledger("KS-38")
def test_two_resolutions_with_their_own_batch_sizes(workshop: Any, folder: Path) -> None:
    small = workshop.config(folder, resolution=64, batch_size=3, buckets={"enabled": False})
    large = workshop.config(folder, resolution=128, batch_size=2, buckets={"enabled": False})
    data = workshop.prepare(small, large)
    shapes = {(spec.dataset, len(spec.uses), tuple(data.load(spec, step=0).latents.shape[2:])) for spec in data.batches(0)}
    assert shapes == {(0, 3, (8, 8)), (1, 2, (16, 16))}
    assert data.largest().dataset == 1
    assert len({spec.dataset for spec in data.batches(0)[:4]}) == 2 or len({spec.dataset for spec in data.batches(1)[:4]}) == 2


def test_loss_weights_follow_the_dataset(workshop: Any, folder: Path, make_folder: Any, tmp_path: Path) -> None:
    others = make_folder(tmp_path / "others", 2)
    data = workshop.prepare(workshop.config(folder, batch_size=2), workshop.config(others, regularisation=True, weight=0.5))
    uses = [0, 0]
    for spec in data.batches(0):
        batch = data.load(spec, step=0)
        uses[spec.dataset] += len(spec.uses)
        assert set(batch.weights.tolist()) == {0.5 if spec.dataset else 1.0}
    assert uses == [6, 6]


def test_only_regularisation_is_refused(workshop: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match="regularisation"):
        workshop.prepare(workshop.config(folder, regularisation=True))


def test_held_out_pictures_are_not_trained(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "many", 20)
    same_again = workshop.config(folder, resolution=96, flip=True, captions={"dropout": 1.0})
    data = workshop.prepare(workshop.config(folder), same_again)
    split = data.hold_out(ValidationConfig(share=0.25, seed=3, max_batches=100))
    trained = {key for batch in all_of(split, 1) for key in batch.keys}
    batches = [split.load(spec, step=0) for spec in split.validation_batches()]
    held = {key for batch in batches for key in batch.keys}
    assert len(held) == 5
    assert not trained & held
    assert len(trained | held) == 20
    assert all(caption for batch in batches for caption in batch.captions), "captions are not dropped when validating"
    assert split.digest != data.digest
    assert data.hold_out(ValidationConfig(share=0.25, seed=3)).digest == split.digest
    assert data.validation_batches() == []


def test_copies_of_a_picture_stay_on_one_side(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "many", 10)
    for number in range(10):
        (folder / f"copy{number}.png").write_bytes((folder / f"{number:02d}.png").read_bytes())
        (folder / f"copy{number}.txt").write_text("copy")
    split = workshop.prepare(workshop.config(folder)).hold_out(ValidationConfig(share=0.3, max_batches=100))
    held = {split.sets[0].items[use.record].digest for spec in split.validation_batches() for use in spec.uses}
    trained = {split.sets[0].items[use.record].digest for spec in split.batches(0) for use in spec.uses}
    assert held
    assert not held & trained


def test_a_picture_that_goes_bad_while_training_is_left_out_with_one_warning(workshop: Any, folder: Path) -> None:
    data = workshop.prepare(workshop.config(folder, batch_size=4, buckets={"enabled": False}), cache={"latents": "off", "text": "off"})
    (folder / "01.png").write_bytes(b"\x89PNG broken")
    batches = all_of(data, 3)
    assert sum(len(batch.keys) for batch in batches) == 15
    assert len([line for line in workshop.warnings if "01.png" in line]) == 1
    for path in folder.glob("*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(DataError, match=r"\.png"):
        data.load(data.batches(0)[0], step=0)


def test_a_vanished_folder_is_waited_for_and_then_ends_the_run(workshop: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = workshop.prepare(workshop.config(folder), cache={"latents": "off", "text": "off"})
    waits: list[float] = []
    away = folder.with_name("away")
    folder.rename(away)
    monkeypatch.setattr(loading_module.time, "sleep", waits.append)
    with pytest.raises(StorageError, match="pictures"):
        data.load(data.batches(0)[0], step=0)
    assert waits == list(loading_module.RETRY_SECONDS)
    monkeypatch.setattr(loading_module.time, "sleep", lambda _: away.exists() and away.rename(folder))
    assert data.load(data.batches(0)[0], step=0).keys


def test_a_picture_that_goes_bad_between_scan_and_encoding_is_skipped(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "many", 12)
    plain, first = workshop.encoders.latents, []

    def latents(pixels: torch.Tensor) -> torch.Tensor:
        if not first:
            (folder / "11.png").write_bytes(b"not a picture")
            first.append(1)
        return plain(pixels)

    workshop.encoders.latents = latents
    data = workshop.prepare(workshop.config(folder), cache={"batch_size": 1})
    assert data.num_pictures == 11
    assert any("11.png" in line for line in workshop.warnings)
    assert sum(len(batch.keys) for batch in all_of(data, 1)) == 11


def test_latents_that_are_not_finite_are_refused_by_name(workshop: Any, folder: Path) -> None:
    workshop.encoders.latents = lambda pixels: torch.full((len(pixels), 16, 8, 8), torch.nan)
    with pytest.raises(NumericError, match="00.png"):
        workshop.prepare(workshop.config(folder))


def test_pictures_checked_before_a_crash_are_not_read_again(workshop: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = workshop.encoders.latents
    workshop.encoders.latents = lambda pixels: pixels / 0 * 0
    with pytest.raises(NumericError):
        workshop.prepare(workshop.config(folder))
    workshop.encoders.latents = plain
    read: list[Path] = []
    monkeypatch.setattr(scan_module, "_read", lambda path, config: read.append(path))
    workshop.prepare(workshop.config(folder))
    assert read == []


def test_what_was_encoded_before_a_crash_is_kept(workshop: Any, folder: Path) -> None:
    plain = workshop.encoders.latents

    def latents(pixels: torch.Tensor) -> torch.Tensor:
        if workshop.encoders.pictures >= 4:
            raise RuntimeError("out of memory")
        return plain(pixels)

    workshop.encoders.latents = latents
    with pytest.raises(RuntimeError):
        workshop.prepare(workshop.config(folder), cache={"batch_size": 2})
    done = workshop.encoders.pictures
    workshop.encoders.latents = plain
    workshop.prepare(workshop.config(folder))
    assert workshop.encoders.pictures == 6 - done


def test_without_an_encoder_a_full_cache_is_enough(workshop: Any, folder: Path) -> None:
    workshop.prepare(workshop.config(folder))
    full = workshop.encoders.as_encoders
    workshop.encoders.as_encoders = lambda: Encoders(None, full().latents_digest, None, full().text_digest)
    workshop.prepare(workshop.config(folder))
    with pytest.raises(ConfigError, match="no autoencoder"):
        workshop.prepare(workshop.config(folder, resolution=96))


def test_what_no_encoder_is_named_for_is_not_cached(workshop: Any, folder: Path) -> None:
    """Training the autoencoder, for one, wants pixels and no text."""
    workshop.encoders.as_encoders = lambda: Encoders(None, "", None, "")
    data = workshop.prepare(workshop.config(folder, captions={"shuffle": True}, color_jitter=0.1))
    batch = data.load(data.batches(0)[0], step=0)
    assert batch.pixels is not None
    assert (batch.latents, batch.text, data.cache_summary) == (None, None, ())


def test_a_warm_up_share_is_one_of_the_length_of_the_run(workshop: Any, folder: Path) -> None:
    data = workshop.prepare(workshop.config(folder, captions={"warmup_steps": 0.5}), cache={"text": "off"})
    spec = data.batches(0)[0]
    assert "picture" in data.load(spec, step=0).captions[0], "without it all tags are used"
    assert data.load(spec, step=0, total_steps=10).captions[0] == "tag"
    assert "picture" in data.load(spec, step=5, total_steps=10).captions[0]
