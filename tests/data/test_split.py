"""The split without a leak: by content, per dataset, the same at every resolution."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxsmith.config.schema import ValidationConfig
from fluxsmith.data.split import Wish, held_out
from fluxsmith.errors import ConfigError, DataError

pytestmark = pytest.mark.ledger("KS-39")


@given(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=0, max_size=30), st.floats(0.01, 0.9), st.integers(0, 9))
def test_a_share_is_held_out_and_something_is_left(pictures: list[str], share: float, seed: int) -> None:
    chosen = held_out([Wish(pictures, share, seed)])
    distinct = set(pictures)
    assert chosen <= distinct
    if len(distinct) >= 2:
        assert 1 <= len(chosen) < len(distinct)
    else:
        assert not chosen


def test_the_same_pictures_are_held_out_in_every_dataset_and_few_change_when_one_is_added() -> None:
    pictures = [f"picture {number}" for number in range(40)]
    chosen = held_out([Wish(pictures, 0.2, 1)])
    assert len(chosen) == 8
    assert held_out([Wish(pictures, 0.2, 1), Wish(list(reversed(pictures)), 0.2, 1)]) == chosen
    assert len(held_out([Wish([*pictures, "one more"], 0.2, 1)]) & chosen) >= 7
    assert held_out([Wish(pictures, 0.2, 2)]) != chosen


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from("abcdefghij"), max_size=12), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 3)), max_size=4
    )
)
def test_every_dataset_gets_its_share_and_a_share_of_one_all(wishes: list[tuple[list[str], float, int]]) -> None:
    chosen = held_out([Wish(*wish) for wish in wishes])
    assert chosen <= {digest for digests, share, _ in wishes if share for digest in digests}
    for digests, share, _ in wishes:
        taken = sum(digest in chosen for digest in digests)
        assert share < 1 or taken == len(digests)
        assert not 0 < share < 1 or len(set(digests)) < 2 or taken >= 1
    assert chosen == held_out([Wish(*wish) for wish in wishes])


def trained_and_held(data: Any) -> tuple[set[tuple[int, str]], set[tuple[int, str]]]:
    """(dataset, picture) of both parts."""

    def names(specs: Any) -> set[tuple[int, str]]:
        return {(use.dataset, data.sets[use.dataset].items[use.record].record.key) for spec in specs for use in spec.uses}

    return names(data.batches(0)), names(data.validation_batches())


def test_datasets_have_their_own_share_and_seed(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "many", 20)

    def held(**options: Any) -> set[str]:
        data = workshop.prepare(workshop.config(folder, **options))
        trained, held = trained_and_held(data.hold_out(ValidationConfig(share=0.1, max_batches=99)))
        assert not trained & held
        assert len(trained | held) == 20
        return {key for _, key in held}

    assert len(held()) == 2
    assert len(held(validation_share=0.3)) == 6
    assert held(validation_share=0.3) != held(validation_share=0.3, validation_seed=5)
    assert held(validation_share=0.0) == set()
    assert held() < held(validation_share=0.3), "a larger share holds out more pictures, not others"


def test_the_same_folder_at_several_resolutions_holds_out_the_same_pictures(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "many", 20)
    configs = [
        workshop.config(folder, validation_share=0.2, validation_seed=1),
        workshop.config(folder, resolution=96, validation_share=0.2, validation_seed=2),
        workshop.config(folder, resolution=128, validation_share=0.0),
    ]
    trained, held = trained_and_held(workshop.prepare(*configs).hold_out(ValidationConfig(max_batches=99)))
    by_set = [{key for dataset, key in held if dataset == place} for place in range(3)]
    assert by_set == [by_set[0], by_set[0], set()]
    assert len(by_set[0]) == 4
    assert {key for _, key in trained} == {f"{number:02d}.png" for number in range(20)} - by_set[0]


def test_a_set_only_for_measuring(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    trained, measured = make_folder(tmp_path / "trained", 8), make_folder(tmp_path / "measured", 3)
    (measured / "new.png").write_bytes((trained / "07.png").read_bytes())
    (measured / "new.txt").write_text("another caption")
    data = workshop.prepare(
        workshop.config(trained, repeats=2),
        workshop.config(measured, validation_share=1.0, repeats=9, flip=True, captions={"dropout": 0.9}),
    )
    split = data.hold_out(ValidationConfig(max_batches=99))
    used, held = trained_and_held(split)
    assert held == {(1, "00.png"), (1, "01.png"), (1, "02.png"), (1, "new.png")}
    assert sum(len(spec.uses) for spec in split.validation_batches()) == 4, "each once"
    assert used == {(0, f"{number:02d}.png") for number in range(3, 7)}, "copies of measured pictures are not trained"
    batches = [split.load(spec, step=0) for spec in split.validation_batches()]
    assert all(batch.captions[0] for batch in batches)


def test_regularisation_pictures_are_not_measured_and_copies_of_measured_ones_not_used(
    workshop: Any, make_folder: Any, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "many", 10)
    data = workshop.prepare(workshop.config(folder), workshop.config(folder, regularisation=True))
    trained, held = trained_and_held(data.hold_out(ValidationConfig(share=0.3, max_batches=99)))
    assert {dataset for dataset, _ in held} == {0}
    assert not {key for _, key in trained} & {key for _, key in held}
    with pytest.raises(ConfigError, match="not held out"):
        workshop.prepare(workshop.config(folder), workshop.config(folder, regularisation=True, validation_share=0.5))


def test_a_split_that_leaves_nothing_is_refused(workshop: Any, folder: Path) -> None:
    data = workshop.prepare(workshop.config(folder, validation_share=1.0))
    with pytest.raises(DataError, match="validation leaves nothing to train") as caught:
        data.hold_out(ValidationConfig())
    assert caught.value.exit_code == 3
    assert "lower validation_share" in str(caught.value)


def test_a_dataset_of_copies_is_warned_about(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    first, second = make_folder(tmp_path / "first", 6), make_folder(tmp_path / "second", 2)
    data = workshop.prepare(workshop.config(first), workshop.config(second), workshop.config(second, validation_share=1.0))
    data.hold_out(ValidationConfig())
    assert any("second: nothing of this dataset is trained" in line for line in workshop.warnings)


@pytest.mark.parametrize("cache", [{}, {"latents": "off", "text": "off"}], ids=["cached", "live"])
def test_nothing_is_drawn_for_measured_pictures(workshop: Any, make_folder: Any, tmp_path: Path, cache: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / "many", 8)
    moving: dict[str, Any] = {"flip": True, "crop": "random", "captions": {"dropout": 0.9}}
    if cache:
        moving |= {"color_aug": True, "color_jitter": 0.5, "captions": {"dropout": 0.9, "shuffle": True, "tag_dropout": 0.5}}

    def measured(**options: Any) -> list[Any]:
        data = workshop.prepare(workshop.config(folder, **options), cache=cache).hold_out(ValidationConfig(share=0.4, max_batches=99))
        return [data.load(spec, step=0) for spec in data.validation_batches()]

    for plain, moved in zip(measured(), measured(**moving), strict=True):
        assert plain.captions == moved.captions
        first, second = (batch.pixels if batch.latents is None else batch.latents for batch in (plain, moved))
        assert torch.equal(first, second)


def test_masks_of_measured_pictures_lie_on_them(workshop: Any, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "many", 8)
    options: dict[str, Any] = {"mask_dir": folder.with_name("masks"), "crop": "random", "flip": True}
    shutil.copytree(folder, folder.with_name("masks"), ignore=shutil.ignore_patterns("*.txt"))
    split = workshop.prepare(workshop.config(folder, **options)).hold_out(ValidationConfig(share=0.4))
    live = workshop.prepare(workshop.config(folder, **options), cache={"latents": "off"}).hold_out(ValidationConfig(share=0.4))
    for spec in split.validation_batches():
        assert torch.equal(split.load(spec, step=0).mask, live.load(spec, step=0).mask)
