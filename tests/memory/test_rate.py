"""FLOPs of a step and what limits it: the known table, and cards."""

import pytest

from fluxsmith.memory.plan import Job, traffic
from fluxsmith.memory.rate import CARDS, attention_flops, card_named, forward_flops, moved_bytes, rate, step_work
from fluxsmith.memory.sizes import FORMS, count, shapes_of

DEV = count(shapes_of(FORMS["dev"]))
# tokens: forward, LoRA, LoRA recomputed, full, full recomputed; TFLOP a sample
TABLE = {1536: (21.5, 44.7, 66.2, 64.5, 86.0), 2816: (41.9, 89.4, 131.3, 125.8, 167.7), 4608: (74.4, 163.6, 238.0, 223.2, 297.5)}


@pytest.mark.ledger("FS-03")
@pytest.mark.parametrize("tokens", TABLE)
def test_flops_are_those_of_the_table(tokens: int) -> None:
    forward, lora, lora_again, full, full_again = TABLE[tokens]
    assert forward_flops(DEV, tokens) == 12_910_854_144 * tokens + 700_416 * tokens**2
    assert forward_flops(DEV, tokens) / 1e12 == pytest.approx(forward, abs=0.05)
    for trains_base, recomputed, known in ((False, 0, lora), (False, 1, lora_again), (True, 0, full), (True, 1, full_again)):
        work = step_work(DEV, tokens, 1, trains_base=trains_base, recomputed=recomputed)
        assert work.total / 1e12 == pytest.approx(known, abs=0.15)  # the table multiplies rounded figures
    assert step_work(DEV, tokens, 4, trains_base=False).model == pytest.approx(4 * step_work(DEV, tokens, 1, trains_base=False).model)
    assert attention_flops(DEV, tokens) == 700_416 * tokens**2


def test_a_card_is_found_by_its_name() -> None:
    assert card_named("NVIDIA GeForce RTX 4090") == CARDS["RTX 4090"]
    assert card_named("NVIDIA H200") == CARDS["H200"]
    assert card_named("Some other card") is None


@pytest.mark.ledger("FS-03")
def test_streaming_is_hidden_at_many_tokens_and_not_at_few() -> None:
    """Half of the blocks in 8 bits over PCIe 4.0 on a 4090: the bus keeps up at 1024 pixels and holds the step up at 256."""
    kinds = {}
    for tokens in (768, 4608):
        job = Job(DEV, quant="int8", trained=1, tokens=tokens, kept=0, streamed=28)
        work = step_work(DEV, tokens, 1, trains_base=False, recomputed=1.0)
        kinds[tokens] = rate(work, CARDS["RTX 4090"], "int8", moved_bytes(*traffic(job)))
    assert kinds[4608].kind == "compute-bound"
    assert kinds[768].kind != "compute-bound"
    assert kinds[768].seconds == kinds[768].transfer > kinds[768].compute
    assert moved_bytes(0, 0, 0) == 0
    assert moved_bytes(2, 100, 0) == 0, "both turning points stay"
    assert moved_bytes(4, 100, 10) == 2 * 100 / 4 * 2 + 20
