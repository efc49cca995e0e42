"""What an adapter cannot do together with the rest of the run is said before it starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.config.load import load_config
from fluxsmith.errors import ConfigError

CASES = [
    ({"adapter.type": "lokr", "checkpoint.format": "peft"}, "PEFT's format has no names for lokr.*checkpoint.format"),
    ({"adapter.type": "oft", "checkpoint.format": "peft"}, "PEFT's format has no names for oft"),
    ({"adapter.type": "dora", "adapter.norm_per": "input", "checkpoint.format": "peft"}, "norms per input"),
    ({"adapter.max_norm": 1.0, "memory.fused_update": "tensor"}, "adapter.max_norm does not work with a fused update"),
    ({"adapter.ggpo_sigma": 1.0, "adapter.ggpo_beta": 1.0, "memory.fused_update": "block"}, "ggpo_sigma does not work with a fused"),
    ({"adapter.ggpo_sigma": 1.0}, "ggpo_sigma and ggpo_beta go together"),
    ({"adapter.type": "oft", "adapter.alpha": 1.0}, "constraint instead of alpha"),
    ({"adapter.type": "full", "adapter.alpha": 1.0}, "has no alpha"),
    ({"adapter.type": "locr"}, '"locr" does not exist.*lokr, lora, oft'),
]


@pytest.mark.parametrize(("changes", "message"), CASES)
def test_refused(tiny_run: Callable[..., dict[str, Any]], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_run(tmp_path / "run", changes))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_allowed(tiny_run: Callable[..., dict[str, Any]], tmp_path: Path, kind: str) -> None:
    changes = {"adapter.type": kind, "adapter.max_norm": 1.0, "checkpoint.format": "peft"}
    assert load_config(tiny_run(tmp_path / "run", changes)).config.checkpoint.format == "peft"
