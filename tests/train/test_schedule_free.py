"""Schedule-free optimizers hold two sets of weights: the averages are shown, measured and exported, the others trained to the same bits."""

import pytest
import tiny_run
import torch
from ran import Go, same

from fluxsmith.adapters.formats.files import read_adapter

pytest.importorskip("schedulefree")
RUN = {
    **tiny_run.LORA, "adapter.targets": "attention", "train.accumulation": 1, "train.ema": None, "train.steps": 6,
    "schedule.name": "constant", "optim": {"type": "schedulefree", "name": "adamw", "lr": 1e-2}, "checkpoint.every": 3,
}  # fmt: skip
LOOKING = {
    "validation.every": 2, "validation.share": 0.2,
    "sample": [{"prompt": "a red circle", "width": 32, "height": 32, "steps": 1, "every": 1}],
}  # fmt: skip


@pytest.mark.ledger("KS-09")
@pytest.mark.ledger("KS-39")
def test_looking_does_not_change_what_is_trained(go: Go) -> None:
    held = {"validation.share": 0.2, "validation.every": 6}
    quiet, watched = go({**RUN, **held}, "quiet"), go({**RUN, **LOOKING}, "watched")
    assert watched.error is None
    assert same(quiet.weights, watched.weights)


@pytest.mark.ledger("KS-09")
def test_the_file_holds_the_average(go: Go) -> None:
    ran = go(RUN)
    path = "dit.double_blocks.0.img_attn.qkv"
    exported = read_adapter(ran.folder / "weights" / "w.safetensors").layers[path].parts[0].tensors["up"].float()
    trained = ran.weights[f"{path}.up"].float()
    assert not torch.equal(exported, trained)
    assert (exported - trained).abs().max() < 0.05


def test_it_resumes_exactly(go: Go) -> None:
    straight = go(RUN, "straight")
    go({**RUN, "train.steps": 3}, "cut")
    assert same(straight.weights, go(RUN, "cut", resume=True).weights)
