"""Classes by dotted path: only what the command line allows, only what is an optimizer."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fluxsmith.config.load import load_config
from fluxsmith.errors import ConfigError
from fluxsmith.optim.groups import Group
from fluxsmith.optim.imported import Config

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "somebodys.py").write_text(
        textwrap.dedent("""
        import torch
        from torch.optim.lr_scheduler import LambdaLR

        class Half(torch.optim.SGD):
            def __init__(self, params, lr, twist=1.0):
                super().__init__(params, lr=lr / 2)
                self.twist = twist

        class Slope(LambdaLR):
            def __init__(self, optimizer, length=10):
                super().__init__(optimizer, lambda step: 1 - step / length)

        class NoOptimizer:
            def __init__(self, params, lr):
                pass
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "somebodys"


def param() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


@pytest.mark.ledger("KS-09")
def test_any_class_with_its_options(package: str) -> None:
    made: Any = Config(type="imported", path=f"{package}.Half", lr=1.0, options={"twist": 2.0}).build([Group("all", (param(),))])
    assert made.twist == 2.0
    assert type(made).__name__ == "Half"


def test_unknown_options_and_names(package: str) -> None:
    with pytest.raises(ConfigError, match="Half has no option twits: write twist"):
        Config(type="imported", path=f"{package}.Half", options={"twits": 1}).build([Group("all", (param(),))])
    with pytest.raises(ConfigError, match=f"write {package}.Half"):
        Config(type="imported", path=f"{package}.Halff").build([Group("all", (param(),))])
    with pytest.raises(ConfigError, match="no_such_package"):
        Config(type="imported", path="no_such_package.Half").build([Group("all", (param(),))])
    with pytest.raises(ConfigError, match="is no optimizer"):
        Config(type="imported", path=f"{package}.NoOptimizer").build([Group("all", (param(),))])


@pytest.mark.parametrize("key", ["path", "class"])
def test_a_run_file_needs_the_command_line(tiny_run: Make, tmp_path: Path, package: str, key: str) -> None:
    values = tiny_run(tmp_path / "run", {"optim": {"type": "imported", key: f"{package}.Half"}})
    with pytest.raises(ConfigError, match=f"--plugin {package}.Half"):
        load_config(values)
    with pytest.raises(ConfigError, match=f"--plugin {package}.Half"):
        load_config(values, plugin_files=[f"{package}.Other"])
    config = load_config(values, plugin_files=[f"{package}.Half"]).config
    assert config.optim.model_dump()["path"] == f"{package}.Half"


@pytest.mark.ledger("KS-10")
def test_schedule_classes_need_it_too(tiny_run: Make, tmp_path: Path, package: str) -> None:
    values = tiny_run(tmp_path / "run", {"schedule": {"name": "imported", "path": f"{package}.Slope", "options": {"length": 20}}})
    with pytest.raises(ConfigError, match=f"--plugin {package}.Slope"):
        load_config(values)
    assert load_config(values, plugin_files=[f"{package}.Slope"]).config.schedule.path == f"{package}.Slope"
    values["schedule"] = {"name": "imported", "path": "StepLR", "options": {"step_size": 3}}
    assert load_config(values).config.schedule.path == "torch.optim.lr_scheduler.StepLR"


def test_torch_needs_no_permission(tiny_run: Make, tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run", {"optim": {"type": "imported", "path": "torch.optim.AdamW"}})
    assert load_config(values).config.optim.type == "imported"
    values["optim"]["path"] = "torch.optim.sgd.os.system"
    with pytest.raises(ConfigError, match="--plugin"):
        load_config(values)
    values["optim"]["path"] = "AdamW"
    with pytest.raises(ConfigError, match=r"no package\.module\.Class"):
        load_config(values)
