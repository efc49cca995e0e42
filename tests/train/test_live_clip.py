"""CLIP-L trained beside cached T5 states: T5 leaves memory, CLIP sees every caption anew."""

from collections.abc import Callable

import pytest
import tiny_run
import torch
from ran import Go, same

from fluxsmith.config.schema import RunConfig
from fluxsmith.events import Bus
from fluxsmith.train.distributed import World
from fluxsmith.train.setup import build

CLIP = {**tiny_run.LORA, "adapter.targets": "attention", "adapter.text_encoders": ["clip_l"], "train.accumulation": 1}


@pytest.mark.ledger("KS-37")
@pytest.mark.ledger("KS-24")
def test_cached_t5_gives_the_same_weights_as_live_t5(go: Go) -> None:
    cached, live = go(CLIP, "cached"), go({**CLIP, "cache.text": "off"}, "live")
    assert cached.error is None
    assert live.error is None
    assert same(cached.weights, live.weights)
    assert any(name.startswith("clip_l.") and value.any() for name, value in cached.weights.items() if name.endswith("up"))


def test_t5_is_not_kept_in_memory(run_config: Callable[..., RunConfig]) -> None:
    parts = build(run_config(CLIP), World(torch.device("cpu")), Bus())
    assert parts.models.t5xxl is None
    assert parts.models.clip_l is not None


def test_samples_use_the_trained_clip(go: Go) -> None:
    sample = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 2}
    ran = go({**CLIP, "optim.lr": 0.5, "adapter.targets": "inputs", "adapter.dit_lr": 1e-12, "sample": [sample]})
    assert ran.warnings == ""
    first, last = sorted((ran.folder / "samples").iterdir())
    assert first.read_bytes() != last.read_bytes()
