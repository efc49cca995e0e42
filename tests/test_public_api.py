"""The names that users import: they exist, are sorted, and cost nothing before they are used."""

import subprocess
import sys

import pytest

import fluxsmith


def test_all_is_sorted_and_importable() -> None:
    assert fluxsmith.__all__ == sorted(fluxsmith.__all__)
    for name in fluxsmith.__all__:
        assert getattr(fluxsmith, name).__name__ == name


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fluxsmith.nothing  # noqa: B018  the access is the test


def test_import_is_light() -> None:
    code = "import sys, fluxsmith; fluxsmith.RunConfig; assert not {'torch', 'transformers', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
