"""`type = "x"` finds x.py; checks run without importing it; realise() gives the real class."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import ValidationError

from fluxsmith.config import choice
from fluxsmith.config.section import PluginConfig, Section

HEAVY = '''"""A plug-in whose module cannot be imported."""
from enum import Enum
from typing import Literal

import a_package_that_does_not_exist
from pydantic import PositiveInt, field_validator

from fluxsmith.config.section import PluginConfig

Mode = Literal["fast", "exact"]
UNUSED = a_package_that_does_not_exist.value


class Kind(Enum):
    A = "a"


class Config(PluginConfig):
    """Options."""

    rank: PositiveInt = 4
    """Rank of the thing."""
    mode: Mode = "fast"
    """Which way."""
    kind: Kind = Kind.A
    """Kind."""

    @field_validator("rank")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value

    def build(self, width: a_package_that_does_not_exist.Tensor) -> a_package_that_does_not_exist.Tensor:
        return a_package_that_does_not_exist.make(self.rank, width)
'''
REAL = '''"""A plug-in that works."""
import fractions

from fluxsmith.config.section import PluginConfig


class Config(PluginConfig):
    rank: int = 1
    """Rank."""

    def build(self) -> fractions.Fraction:
        return fractions.Fraction(1, self.rank)
'''
NOT_LIGHT = """import fractions
from fluxsmith.config.section import PluginConfig


class Config(PluginConfig):
    size: int = int(fractions.Fraction(6, 2))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "plugs_under_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "heavy.py").write_text(HEAVY)
    (folder / "real.py").write_text(REAL)
    (folder / "not_light.py").write_text(NOT_LIGHT)
    (folder / "base.py").write_text('"""Support code."""\nclass ConfigBase: ...\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield "plugs_under_test"
    for name in [name for name in sys.modules if name.startswith(("plugs_under_test", "fluxsmith_plugin_"))]:
        del sys.modules[name]


def holder(package: str) -> type[Section]:
    class Holder(Section):
        one: Annotated[PluginConfig, choice.Choice(package)]
        many: list[Annotated[PluginConfig, choice.Choice(package)]] = []
        maybe: Annotated[PluginConfig, choice.Choice(package)] | None = None

    return Holder


def test_names_are_the_files_with_a_config(package: str) -> None:
    assert choice.plugin_names(package) == ["heavy", "not_light", "real"]


def test_check_does_not_import_the_plugin(package: str) -> None:
    config = holder(package)(one={"type": "heavy", "rank": 8, "mode": "exact", "kind": "a"})
    assert (config.one.rank, config.one.mode, config.one.kind.value) == (8, "exact", "a")
    assert type(config.one).model_fields["rank"].description == "Rank of the thing."
    assert f"{package}.heavy" not in sys.modules


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "heavy", "rank": 3}, "must be even"),
        ({"type": "heavy", "rank": -2}, "greater than 0"),
        ({"type": "heavy", "mode": "slow"}, "'fast' or 'exact'"),
        ({"type": "heavy", "rang": 2}, "Extra inputs"),
        ({"type": "hevy"}, "unknown type 'hevy'; available: heavy, not_light, real"),
        ({"type": "base"}, "unknown type 'base'"),
        ({"type": "os.path"}, "unknown type 'os.path'"),
        ({"type": 3}, "unknown type '3'"),
        ({"rank": 2}, "`type` is missing"),
        ("heavy", "a table with `type` is expected"),
    ],
)
def test_wrong_values_are_refused_at_their_place(package: str, value: object, expected: str) -> None:
    with pytest.raises(ValidationError, match="1 validation error") as caught:
        holder(package)(one={"type": "real"}, many=[{"type": "real"}, value])
    error = caught.value.errors()[0]
    assert expected in error["msg"]
    assert error["loc"][:2] == ("many", 1)


def test_realise_gives_the_real_class_with_the_same_values(package: str) -> None:
    config = holder(package)(one={"type": "real", "rank": 4}).one
    real = choice.realise(config)
    assert float(real.build()) == 0.25
    assert (real.type, real.folder) == ("real", package)
    assert choice.realise(real) is real


def test_config_that_is_not_light_is_imported(package: str) -> None:
    assert holder(package)(one={"type": "not_light"}).one.size == 3
    assert f"{package}.not_light" in sys.modules


def test_edited_plugin_is_read_again(package: str, tmp_path: Path) -> None:
    assert not hasattr(holder(package)(one={"type": "real"}).one, "extra")
    file = tmp_path / package / "real.py"
    file.write_text(REAL.replace("rank: int = 1", "extra: int = 7\n    rank: int = 1"))
    assert holder(package)(one={"type": "real"}).one.extra == 7


def test_plugin_outside_only_by_file(package: str, tmp_path: Path) -> None:
    outside = tmp_path / "mine" / "own.py"
    outside.parent.mkdir()
    outside.write_text(REAL)
    with pytest.raises(ValidationError, match="unknown type 'mine.own'"):
        holder(package)(one={"type": "mine.own"})
    for name in ("own", "mine.own"):
        config = holder(package).model_validate({"one": {"type": name, "rank": 2}}, context={choice.CONTEXT_KEY: (outside,)})
        assert float(choice.realise(config.one).build()) == 0.5


def test_dump_and_schema_know_the_plugins(package: str) -> None:
    config = holder(package)(one={"type": "heavy"}, maybe={"type": "real"})
    assert config.model_dump(mode="json")["one"] == {"type": "heavy", "rank": 4, "mode": "fast", "kind": "a"}
    assert config.model_dump()["maybe"] == {"type": "real", "rank": 1}
    schema = holder(package).model_json_schema()
    options = schema["properties"]["one"]["oneOf"]
    names = [option["properties"]["type"]["const"] for option in options]
    assert names == ["heavy", "not_light", "real"]
    assert options[0]["properties"]["rank"]["description"] == "Rank of the thing."
    assert options[0]["required"] == ["type"]


def test_literal_reads_without_executing(tmp_path: Path) -> None:
    file = tmp_path / "family.py"
    file.write_text("import nothing_here\nPRESETS: dict = {'dev': {'defaults': {'noise.shift': 3.0}}}\n")
    assert choice.literal(file, "PRESETS") == {"dev": {"defaults": {"noise.shift": 3.0}}}
    assert choice.literal(file, "OTHER") is None


def test_every_plugin_of_the_project_is_light() -> None:
    code = (
        "import sys\nfrom fluxsmith.config import choice\n"
        "for package in ('models.family', 'adapters', 'optim', 'train.objectives', 'data.sources', 'train.sinks', 'controls', 'quant'):\n"
        "    for name in choice.plugin_names(f'fluxsmith.{package}'):\n"
        "        choice.config_class(f'fluxsmith.{package}', name)\n"
        "        assert f'fluxsmith.{package}.{name}' not in sys.modules, (package, name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
