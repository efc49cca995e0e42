"""Paths of a run file are found from the current folder first, then beside the file."""

from pathlib import Path

import pytest

from fluxsmith.config.nearby import find_nearby


def test_beside_the_file_when_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (there / "cats").mkdir(parents=True)
    (here / "dogs").mkdir(parents=True)
    (there / "dogs").mkdir()
    monkeypatch.chdir(here)
    tree = {"data": [{"path": "cats"}, {"path": "dogs"}, {"path": "birds"}], "model": {"path": "org/name", "ae": ""}}
    find_nearby(tree, there)
    assert [one["path"] for one in tree["data"]] == [str(there / "cats"), "dogs", "birds"]
    assert tree["model"] == {"path": "org/name", "ae": ""}
