"""The stores: what is put comes back, in memory, from packs, after a restart; damage is noticed, set aside and survived."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxsmith.data import cache as cache_module
from fluxsmith.data.buckets import Placement
from fluxsmith.data.cache import Entry, MemoryStore, PackStore, key_of, latents_key, text_key
from fluxsmith.data.index import Known, PictureIndex, Stamp, stamp_of
from fluxsmith.data.transforms import PixelPlan
from fluxsmith.data.types import Size
from fluxsmith.errors import DataError, StorageError
from fluxsmith.io.durable import Disk


def entry(number: int, size: int = 8) -> Entry:
    return {
        "latents": torch.full((2, size, 3), float(number)),
        "half": torch.full((3,), number, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
    }


def equal(first: Entry, second: Entry) -> bool:
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def keys(count: int) -> list[str]:
    return [key_of(number=number) for number in range(count)]


def filled(folder: Path, count: int, stamps: dict[str, Stamp] | None = None) -> PackStore:
    store = PackStore(folder, stamps={} if stamps is None else stamps)
    for number, key in enumerate(keys(count)):
        store.put(key, entry(number))
    store.flush()
    return store


@pytest.mark.ledger("KS-24")
@pytest.mark.ledger("KS-25")
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_is_put_comes_back(tmp_path: Path, kind: str) -> None:
    store = MemoryStore() if kind == "memory" else PackStore(tmp_path / "latents", stamps={})
    for number, key in enumerate(keys(5)):
        store.put(key, entry(number))
        assert equal(store.get(key), entry(number)), "also before it is written"
    store.flush()
    assert all(equal(store.get(key), entry(number)) for number, key in enumerate(keys(5)))
    assert key_of(number=99) not in store
    with pytest.raises(KeyError):
        store.get(key_of(number=99))


def test_a_new_store_reads_what_an_old_one_wrote_from_several_threads(tmp_path: Path) -> None:
    filled(tmp_path / "latents", 300)
    store = PackStore(tmp_path / "latents", stamps={})
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(store.get, keys(300)))
    assert all(equal(one, entry(number)) for number, one in enumerate(entries))


def test_many_small_entries_share_few_files(tmp_path: Path) -> None:
    filled(tmp_path / "latents", 600)
    packs = [path for path in (tmp_path / "latents").rglob("*") if path.is_file()]
    assert len(packs) == 3
    assert all(path.parent.name == path.name[:2] for path in packs)


def test_large_entries_are_not_kept_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PACK_BYTES", 1000)
    store = PackStore(tmp_path / "latents", stamps={})
    store.put(keys(1)[0], entry(0, size=100))
    assert len(list((tmp_path / "latents").rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "zero", "empty", "longer", "other digest"])
def test_a_damaged_pack_is_set_aside_and_the_others_stay(tmp_path: Path, damage: str) -> None:
    stamps: dict[str, Stamp] = {}
    filled(tmp_path / "latents", 300, stamps)
    packs = sorted((tmp_path / "latents").rglob("*.safetensors"))
    data = bytearray(packs[0].read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    elif damage == "cut":
        del data[-100:]
    elif damage == "zero":
        data = bytearray(len(data))
    elif damage == "empty":
        data = bytearray()
    elif damage == "longer":
        data += b"more"
    else:
        place = data.index(b"fluxsmith_cache") + 75
        data[place] = ord("0") if data[place] != ord("0") else ord("1")
    packs[0].write_bytes(data)
    store = PackStore(tmp_path / "latents", stamps=stamps)
    assert [path for path, _ in store.broken] == [packs[0].with_suffix(".bad")]
    assert packs[0].with_suffix(".bad").read_bytes() == data
    left = [number for number, key in enumerate(keys(300)) if key in store]
    assert 0 < len(left) < 300
    assert all(equal(store.get(keys(300)[number]), entry(number)) for number in left)
    assert PackStore(tmp_path / "latents", stamps=stamps).broken == []


def test_damage_that_leaves_size_and_time_alone_needs_verify(tmp_path: Path) -> None:
    stamps: dict[str, Stamp] = {}
    filled(tmp_path / "latents", 3, stamps)
    pack = next((tmp_path / "latents").rglob("*.safetensors"))
    status, data = pack.stat(), bytearray(pack.read_bytes())
    data[-5] ^= 1
    pack.write_bytes(data)
    os.utime(pack, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not PackStore(tmp_path / "latents", stamps=stamps).broken
    assert PackStore(tmp_path / "latents", stamps=stamps, verify=True).broken


def test_damage_is_repaired_by_the_next_start(workshop: Any, folder: Path) -> None:
    config = workshop.config(folder)
    first = workshop.prepare(config)
    expected = {key: batch.latents for spec in first.batches(0) for batch in [first.load(spec, step=0)] for key in batch.keys}
    pack = next((workshop.root / "run" / "cache" / "latents").rglob("*.safetensors"))
    pack.write_bytes(pack.read_bytes()[:-7])
    second = workshop.prepare(config)
    assert workshop.encoders.pictures == 6
    assert [line for line in workshop.warnings if "set aside" in line and pack.stem in line]
    found = {key: batch.latents for spec in second.batches(0) for batch in [second.load(spec, step=0)] for key in batch.keys}
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_pack_deleted_during_the_run_ends_it_with_a_cure(tmp_path: Path) -> None:
    store = filled(tmp_path / "latents", 2)
    next((tmp_path / "latents").rglob("*.safetensors")).unlink()
    with pytest.raises(DataError, match="start the command again"):
        store.get(keys(1)[0])


class FullDisk(Disk):
    """Has no room for data."""

    def tick(self, operation: str, path: Path) -> None:
        if operation == "half":
            raise OSError(errno.ENOSPC, "no space")


def test_a_full_disk_leaves_the_old_packs_and_says_so(tmp_path: Path) -> None:
    stamps: dict[str, Stamp] = {}
    filled(tmp_path / "latents", 3, stamps)
    store = PackStore(tmp_path / "latents", stamps=stamps, disk=FullDisk())
    store.put(key_of(number=50), entry(50))
    with pytest.raises(StorageError, match="disk full"):
        store.flush()
    again = PackStore(tmp_path / "latents", stamps=stamps)
    assert all(key in again for key in keys(3))
    assert not again.broken


def test_two_stores_may_share_a_folder(tmp_path: Path) -> None:
    first, second = PackStore(tmp_path / "latents", stamps={}), PackStore(tmp_path / "latents", stamps={})
    for store in (first, second):
        for number, key in enumerate(keys(4)):
            store.put(key, entry(number))
        store.flush()
    assert all(key in PackStore(tmp_path / "latents", stamps={}) for key in keys(4))


def test_latents_keys_hold_every_setting() -> None:
    placement = Placement(Size(64, 64), Size(70, 64), 3, 0)
    plan = PixelPlan(placement, "area")
    variants = [
        latents_key("picture", plan, (255, 255, 255), "ae"),
        latents_key("other", plan, (255, 255, 255), "ae"),
        latents_key("picture", plan, (0, 0, 0), "ae"),
        latents_key("picture", plan, (255, 255, 255), "other ae"),
        latents_key("picture", plan._replace(flipped=True), (255, 255, 255), "ae"),
        latents_key("picture", plan._replace(interpolation="box"), (255, 255, 255), "ae"),
        latents_key("picture", plan._replace(placement=placement._replace(x=4)), (255, 255, 255), "ae"),
        latents_key("picture", plan._replace(placement=placement._replace(y=1)), (255, 255, 255), "ae"),
        latents_key("picture", plan._replace(placement=placement._replace(resized=Size(71, 64))), (255, 255, 255), "ae"),
        latents_key("picture", plan._replace(placement=placement._replace(bucket=Size(48, 64))), (255, 255, 255), "ae"),
        text_key("a", "t"),
        text_key("b", "t"),
        text_key("a", "u"),
    ]
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 1}', '{"format": 99, "pictures": {}, "packs": {}}', '{"format": 1, "pictures": {"a": 3}, "packs": {}}'],
)
def test_a_damaged_index_is_only_a_lost_shortcut(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    assert PictureIndex(tmp_path / "index.json").pictures == {}


def test_the_index_remembers_and_keeps_what_others_wrote(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    for path in (one, two):
        path.write_bytes(b"x")
    for path in (one, two):
        index = PictureIndex(tmp_path / "index.json")
        index.note(path, Known(stamp_of(path), "digest", Size(3, 4), "caption"))
        index.save()
    index = PictureIndex(tmp_path / "index.json")
    assert index.unchanged(one) == Known(stamp_of(one), "digest", Size(3, 4), "caption")
    two.write_bytes(b"xx")
    assert index.unchanged(two) is None
    assert index.before(two) is not None
