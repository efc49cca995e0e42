"""The caption pipeline, rule by rule."""

import random
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxsmith.config.dataset import CaptionConfig
from fluxsmith.data.captions import can_be_empty, render, steady, varying
from fluxsmith.randomness import python_random

TAGS = "cat, sitting, red hat, window, rain"


def say(caption: str, seed: int = 0, *, epoch: int = 0, step: int = 0, total_steps: int = 100, **options: Any) -> str:
    rng = python_random(seed, "caption", 0)
    return render(caption, CaptionConfig(**options), rng=rng, epoch=epoch, step=step, total_steps=total_steps)


def many(caption: str, count: int = 300, **options: Any) -> Counter[str]:
    return Counter(say(caption, seed, **options) for seed in range(count))


pytestmark = pytest.mark.ledger("KS-41")


def test_without_options_the_first_line_is_used_as_it_is() -> None:
    assert say("  a cat,sitting ,here\nsecond line ") == "a cat,sitting ,here"
    assert say("\n\n  later \n") == "later"
    assert say("") == ""


def test_prefix_and_suffix_stand_around_the_caption() -> None:
    assert say("a cat", prefix="photo of", suffix="by night") == "photo of a cat by night"
    assert say("", prefix="photo of", suffix="by night") == "photo of by night"
    assert say("a cat", prefix=" photo of ") == "photo of a cat"


def test_prefix_and_suffix_are_not_tags() -> None:
    options = {"prefix": "P", "suffix": "S", "shuffle": True, "keep_tokens": 1, "tag_dropout": 0.5}
    for text in many("a, b, c, d", **options):
        assert text.startswith("P a")
        assert text.endswith(" S")
        assert set(text.removeprefix("P ").removesuffix(" S").split(", ")) <= {"a", "b", "c", "d"}


def test_shuffle_moves_every_tag_everywhere_and_loses_none() -> None:
    seen = many("a, b, c", shuffle=True)
    assert set(seen) == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}
    assert min(seen.values()) > 20


def test_keep_tokens_stay_first() -> None:
    seen = many(TAGS, shuffle=True, keep_tokens=2)
    assert all(text.startswith("cat, sitting, ") for text in seen)
    assert len(seen) == 6


def test_keep_separator_marks_a_fixed_beginning_and_a_fixed_end() -> None:
    seen = many("x, y ||| a, b ||| z", shuffle=True, keep_separator="|||", keep_tokens=4)
    assert set(seen) == {"x, y, a, b, z", "x, y, b, a, z"}


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"tag_dropout": 0.5}, {"warmup_steps": 5}], ids=str)
def test_keep_separator_is_never_left_in_the_text(options: dict[str, Any]) -> None:
    for caption in ("x ||| a ||| z ||| more", "||| a", "a |||", "|||"):
        assert all("|" not in text for text in many(caption, 20, keep_separator="|||", **options))
    assert say("x ||| a, b", keep_separator="|||", prefix="p ||| q") == "p q x, a, b"


def test_tag_dropout_drops_its_share_of_the_flexible_tags() -> None:
    seen = many("keep, a, b, c, d", 2000, keep_tokens=1, tag_dropout=0.3)
    left = sum(count * (len(text.split(", ")) - 1) for text, count in seen.items())
    assert all(text.startswith("keep") for text in seen)
    assert left / (2000 * 4) == pytest.approx(0.7, abs=0.02)


def test_whole_caption_dropout_drops_its_share_with_prefix_and_all() -> None:
    seen = many("a cat", 2000, dropout=0.25, prefix="photo of")
    assert set(seen) == {"", "photo of a cat"}
    assert seen[""] / 2000 == pytest.approx(0.25, abs=0.03)


def test_every_nth_epoch_is_dropped_counting_from_one() -> None:
    assert [say("a", epoch=epoch, dropout_every_epochs=3) for epoch in range(6)] == ["a", "a", "", "a", "a", ""]


def test_wildcards_choose_a_line_and_one_of_the_braces() -> None:
    seen = many("a {red|blue} cat\n\na {{literal}} dog", 600, wildcards=True)
    assert set(seen) == {"a red cat", "a blue cat", "a {literal} dog"}
    assert seen["a {literal} dog"] / 600 == pytest.approx(0.5, abs=0.07)
    assert say("a {red|blue} cat") == "a {red|blue} cat"
    assert set(many("{x|}", 50, wildcards=True)) == {"x", ""}
    assert set(many("a", 50, wildcards=True, prefix="{p|q}")) == {"p a", "q a"}


def test_warm_up_adds_tags_step_by_step() -> None:
    def at(step: int) -> int:
        return len(say("k, a, b, c, d, e", step=step, keep_tokens=1, warmup_steps=10, warmup_min=1).split(", ")) - 1

    assert [at(step) for step in (0, 2, 3, 5, 8, 9, 10, 50)] == [1, 1, 2, 3, 4, 4, 5, 5]
    assert say("a, b, c", step=50, total_steps=200, warmup_steps=0.5, warmup_min=1) == "a, b"
    assert say("a", step=0, warmup_steps=10, warmup_min=5) == "a"


def test_warm_up_cuts_before_the_shuffle() -> None:
    assert set(many("a, b, c, d", step=0, warmup_steps=10, warmup_min=2, shuffle=True)) == {"a, b", "b, a"}


def test_secondary_separator_keeps_a_group_together() -> None:
    seen = many("a;;;b, c", shuffle=True, secondary_separator=";;;")
    assert set(seen) == {"a,b, c", "c, a,b"}
    assert say("a;;;b", secondary_separator=";;;", separator="|") == "a|b"


def test_another_separator() -> None:
    assert set(many("a. b", shuffle=True, separator=".")) == {"a. b", "b. a"}
    assert set(many("a b", shuffle=True, separator=" ")) == {"a b", "b a"}


def test_trigger_replaces_its_placeholder() -> None:
    assert say("[trigger] on a [trigger]", trigger="zxcat") == "zxcat on a zxcat"
    assert say("a cat", prefix="[trigger],", trigger="zxcat") == "zxcat, a cat"
    assert say("[trigger]") == "[trigger]"


def test_the_same_key_gives_the_same_caption() -> None:
    options = {"shuffle": True, "tag_dropout": 0.3, "dropout": 0.1, "wildcards": True}
    assert [say(TAGS, seed, **options) for seed in range(50)] == [say(TAGS, seed, **options) for seed in range(50)]


def test_switching_an_option_off_does_not_move_the_dropout_draws() -> None:
    plain = [say(TAGS, seed, dropout=0.3) == "" for seed in range(200)]
    assert plain == [say(TAGS, seed, dropout=0.3, shuffle=True, wildcards=True, tag_dropout=0.2) == "" for seed in range(200)]


def test_steady_drops_and_moves_nothing() -> None:
    config = CaptionConfig(shuffle=True, dropout=1.0, tag_dropout=1.0, warmup_steps=100, dropout_every_epochs=1, prefix="p")
    assert steady("a, b, c", config) == "p a, b, c"


def test_which_options_can_be_cached() -> None:
    assert varying(CaptionConfig(dropout=0.5, prefix="a", keep_tokens=3, dropout_every_epochs=2)) == ()
    assert varying(CaptionConfig(shuffle=True, warmup_steps=1)) == ("captions.shuffle", "captions.warmup_steps")
    assert can_be_empty(CaptionConfig(dropout=0.1))
    assert can_be_empty(CaptionConfig(dropout_every_epochs=2))
    assert not can_be_empty(CaptionConfig(tag_dropout=1.0))


@given(st.text(max_size=80), st.integers(0, 5), st.floats(0, 1), st.booleans(), st.booleans())
def test_any_text_renders(caption: str, keep: int, dropout: float, shuffle: bool, wildcards: bool) -> None:
    config = CaptionConfig(
        keep_tokens=keep, tag_dropout=dropout, shuffle=shuffle, wildcards=wildcards, keep_separator="|||", warmup_steps=3
    )
    text = render(caption, config, rng=random.Random(1), epoch=0, step=1, total_steps=9)
    assert "|||" not in text
    assert "\n" not in text


def test_affixes_that_are_tags_are_shuffled_counted_and_dropped() -> None:
    """What the document of sd-scripts promises: shuffling is performed with these strings included."""
    affixes = {"prefix": "best, sharp, ", "suffix": ", from side", "shuffle_affixes": True}
    seen = many("a, b", 400, shuffle=True, **affixes)
    assert all(set(text.split(", ")) == {"best", "sharp", "a", "b", "from side"} for text in seen)
    assert len({text.split(", ")[-1] for text in seen}) == 5
    kept = many("a, b", 100, shuffle=True, keep_tokens=2, **affixes)
    assert all(text.startswith("best, sharp, ") for text in kept)
    assert len(kept) == 6
    assert "from side" not in say("a, b", tag_dropout=1.0, keep_tokens=1, **affixes)
    assert say("a, b", **affixes) == "best, sharp, a, b , from side", "joined with a space, and left alone when no tag is touched"
    marked = many("a, b", 50, shuffle=True, keep_separator="|||", prefix="x |||", suffix="||| z", shuffle_affixes=True)
    assert set(marked) == {"x, a, b, z", "x, b, a, z"}
    assert say("", prefix="{p|p}", suffix="[trigger]", trigger="t", wildcards=True, shuffle_affixes=True) == "p t"


def test_the_example_of_the_document() -> None:
    seen = many("aaa, bbb ||| ccc, ddd, eee, fff ||| ggg, hhh", 400, shuffle=True, keep_separator="|||")
    assert len(seen) == 24
    assert all(text.startswith("aaa, bbb, ") and text.endswith(", ggg, hhh") for text in seen)
    assert say("aaa;;;bbb;;;ccc", secondary_separator=";;;") == "aaa,bbb,ccc"


def test_captions_without_the_mark_keep_their_first_tags() -> None:
    options = {"shuffle": True, "keep_separator": "|||", "keep_tokens": 1}
    assert set(many("a, b, c", 50, **options)) == {"a, b, c", "a, c, b"}
    assert set(many("a, b ||| c", 50, **options)) == {"a, b, c"}


def test_other_lines_that_are_notes() -> None:
    options = {"wildcards": True, "first_line": True}
    assert set(many("a {red|blue} cat\nphoto by someone", 50, **options)) == {"a red cat", "a blue cat"}
    assert say("a\nb", first_line=True) == "a"


def test_the_last_step_is_the_secondary_separator() -> None:
    """So a group that is dropped is dropped whole, and a group of the prefix is one as well."""
    seen = many("a;;;b, c", 200, tag_dropout=0.5, secondary_separator=";;;", prefix="p;;;q")
    assert set(seen) == {"p,q", "p,q a,b", "p,q c", "p,q a,b, c"}


def test_whole_dropout_comes_before_everything() -> None:
    assert set(many("a ||| b", 50, dropout=1.0, prefix="p", suffix="s", keep_separator="|||", keep_tokens=9, shuffle_affixes=True)) == {""}


tag = st.text(alphabet="abcdefgh ", min_size=1, max_size=6).map(str.strip).filter(bool)


@given(
    tags=st.lists(tag, min_size=1, max_size=9),
    keep=st.integers(0, 10),
    dropout=st.sampled_from([0.0, 0.4, 1.0]),
    shuffle=st.booleans(),
    warmup=st.sampled_from([0, 4, 0.5]),
    step=st.integers(0, 12),
    seed=st.integers(0, 999),
)
def test_kept_tags_stay_and_the_others_are_a_part_of_what_was_there(
    tags: list[str], keep: int, dropout: float, shuffle: bool, warmup: float, step: int, seed: int
) -> None:
    text = say(
        ", ".join(tags), seed, step=step, total_steps=10, keep_tokens=keep, tag_dropout=dropout, shuffle=shuffle, warmup_steps=warmup
    )
    found = text.split(", ") if text else []
    kept, flexible = tags[:keep], tags[keep:]
    assert found[: len(kept)] == kept
    rest = Counter(found[len(kept) :])
    limit = {0: 0, 4: 4, 0.5: 5}[warmup]
    most = flexible if step >= limit else flexible[: max(1, int(step * (len(flexible) - 1) / limit) + 1)]
    assert not rest - Counter(most)
    if not dropout:
        assert rest == Counter(most)
    if not shuffle:
        order = iter(flexible)
        assert all(any(one == other for other in order) for one in found[len(kept) :])


@given(st.lists(tag, min_size=1, max_size=4), st.lists(tag, min_size=1, max_size=5), st.lists(tag, max_size=3), st.integers(0, 99))
def test_marks_fix_both_ends(head: list[str], body: list[str], tail: list[str], seed: int) -> None:
    caption = " ||| ".join(", ".join(part) for part in (head, body, tail) if part)
    found = say(caption, seed, shuffle=True, tag_dropout=0.3, keep_separator="|||").split(", ")
    assert found[: len(head)] == head
    assert not tail or found[-len(tail) :] == tail
    assert not Counter(found[len(head) : len(found) - len(tail)]) - Counter(body)


@given(st.lists(tag, min_size=1, max_size=4), st.lists(st.lists(tag, min_size=1, max_size=3), min_size=1, max_size=3), st.integers(0, 99))
def test_wildcards_give_one_line_with_one_of_each_choice(words: list[str], choices: list[list[str]], seed: int) -> None:
    lines = [f"{word} {' '.join('{' + '|'.join(parts) + '}' for parts in choices)} {{{{kept}}}}" for word in words]
    found = say("\n".join(lines), seed, wildcards=True)
    patterns = [
        " ".join([re.escape(word), *(f"(?:{'|'.join(map(re.escape, parts))})" for parts in choices), re.escape("{kept}")]) for word in words
    ]
    assert any(re.fullmatch(pattern, found) for pattern in patterns)
