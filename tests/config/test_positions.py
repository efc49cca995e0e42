"""Positions of keys in TOML text, and agreement with tomllib on which keys there are."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tomlkit import dumps

from fluxsmith.config.positions import key_positions

TEXT = '''# a comment [not.a.table]
title = "x = 1 # no"   # [no]
multi = """
a = 1
""\\" b = 2
"""
[model]
type = 'flux1'
"quoted key" . inner = 3
[[data]]
path = "a"  # first
[data.captions]
shuffle = true
[[data]]
path = "b"
sizes = [ [1, 2],
  [3, 4], # two
]
sample = [{ prompt = "}", seed = 1 }, { prompt = "]" }]
'''


@pytest.mark.parametrize(
    ("path", "line", "column"),
    [
        (("title",), 2, 1),
        (("multi",), 3, 1),
        (("model",), 7, 1),
        (("model", "type"), 8, 1),
        (("model", "quoted key", "inner"), 9, 1),
        (("data", 0, "path"), 11, 1),
        (("data", 0, "captions", "shuffle"), 13, 1),
        (("data", 1), 14, 1),
        (("data", 1, "path"), 15, 1),
        (("data", 1, "sizes", 1, 0), 17, 4),
        (("data", 1, "sample", 0, "seed"), 19, 27),
        (("data", 1, "sample", 1, "prompt"), 19, 41),
    ],
)
def test_positions(path: tuple[str | int, ...], line: int, column: int) -> None:
    assert key_positions(TEXT)[path] == (line, column)


def paths(tree: Any, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path}.union(*[paths(value, (*path, key)) for key, value in items])


def test_all_keys_are_found() -> None:
    assert set(key_positions(TEXT)) == paths(tomllib.loads(TEXT)) - {()}


KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6).filter(
    lambda key: "\\" not in key and '"' not in key
)
VALUES = st.recursive(
    st.integers(-5, 5) | st.booleans() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_scan_follows_any_valid_toml(tree: dict[str, Any]) -> None:
    text = dumps(tree)
    assert set(key_positions(text)) == paths(tomllib.loads(text)) - {()}
