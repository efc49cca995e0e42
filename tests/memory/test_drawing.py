"""Drawing within a limit, from sizes alone: real shapes fit 8 GB, everything streamed fits 4 GB; the choice is the smallest that fits."""

import pytest

from fluxsmith.memory.drawing import GIB, Part, activations, resident, within
from fluxsmith.memory.sizes import AUTOENCODER, CLIP_L, FORMS, count, shapes_of

DEV = count(shapes_of(FORMS["dev"]))
T5_LAYER, T5_REST = 192_940_032, 4_762_310_656 - 24 * 192_940_032
DOUBLE, SINGLE = 339_831_296, 141_591_808  # with modulation: those of a ControlNet stay in their blocks
UNION = Part("control 0", "denoise", (*[2 * DOUBLE] * 5, *[2 * SINGLE] * 10), 2 * 150_000_000)


def parts(*controls: Part) -> list[Part]:
    """FLUX.1-dev in bf16, its modulation in the look-ahead's rows; the autoencoder in fp32."""
    return [
        Part("clip_l", "text", (), 2 * CLIP_L),
        Part("t5xxl", "text", (2 * T5_LAYER,) * 24, 2 * T5_REST),
        Part("dit", "denoise", tuple(2 * block for block in DEV.blocks), 2 * DEV.rest),
        Part("ae", "decode", (), 4 * AUTOENCODER),
        *controls,
    ]


@pytest.mark.ledger("DS-08G")
@pytest.mark.parametrize(
    ("name", "extra", "controls"), [("dev", 0, ()), ("kontext", 4096, ()), ("controlnet", 0, (UNION,)), ("all", 4096, (UNION,))]
)
def test_real_shapes_within_8_and_4_gigabytes(name: str, extra: int, controls: tuple[Part, ...]) -> None:
    tokens = 4096 + 512 + extra
    eight = within(parts(*controls), 8.0, tokens=tokens, hidden=3072, pixels=1024**2)
    assert eight.fits
    assert eight.peak <= 8 * GIB
    assert 0 < eight.streamed["dit"] < 57 or controls
    nothing = within(parts(*controls), 0.0, tokens=tokens, hidden=3072, pixels=1024**2)
    assert nothing.streamed["dit"] == 57
    assert nothing.streamed["t5xxl"] == 24
    assert nothing.peak < 4 * GIB


def test_a_large_card_streams_nothing() -> None:
    drawing = within(parts(UNION), 40.0, tokens=4608, hidden=3072, pixels=1024**2)
    assert not drawing.streamed
    expected = (
        sum(2 * block for block in DEV.blocks) + 2 * DEV.rest + UNION.size + activations("denoise", tokens=4608, hidden=3072, pixels=0)
    )
    assert drawing.peaks["denoise"] == expected + GIB // 2


def test_one_layer_less_would_not_fit() -> None:
    for limit in (6.0, 8.0, 12.0):
        drawing = within(parts(), limit, tokens=4608, hidden=3072, pixels=1024**2)
        dit = parts()[2]
        less = drawing.peaks["denoise"] - resident(dit, drawing.streamed["dit"]) + resident(dit, drawing.streamed["dit"] - 1)
        assert drawing.peaks["denoise"] <= limit * GIB < less


def test_larger_pictures_leave_less_for_weights() -> None:
    small = within(parts(), 12.0, tokens=4608, hidden=3072, pixels=1024**2)
    large = within(parts(), 12.0, tokens=4 * 4096 + 512, hidden=3072, pixels=2048**2)
    assert large.streamed["dit"] > small.streamed["dit"]
    assert large.peaks["decode"] == 4 * AUTOENCODER + 1536**2 * 1536 + GIB // 2  # in tiles


def test_what_cannot_be_met_is_said() -> None:
    drawing = within([Part("ae", "decode", (), 3 * GIB)], 2.0, tokens=0, hidden=0, pixels=1024**2)
    assert not drawing.fits
    assert drawing.peaks["decode"] > 3 * GIB
