"""The split without a leak: by content, per dataset, the same at every resolution."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxsmith.data.split import Wish, held_out

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
