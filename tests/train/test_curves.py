"""Curves: round ticks, honest scales, thinning, smoothing."""

import re

import pytest

from fluxsmith.train.curves import BOTTOM, HEIGHT, LEFT, MOST_POINTS, RIGHT, TOP, WIDTH, smoothed, svg_curve, thinned, ticks


def places(svg: str, style: str = "curve") -> list[tuple[float, float]]:
    found = re.search(rf'<polyline class="{style}" points="([^"]*)"', svg)
    assert found
    return [tuple(map(float, pair.split(","))) for pair in found[1].split()]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.03, 0.47, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (1, 1000, [0, 200, 400, 600, 800, 1000]),
        (1e-6, 1e-4, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
        (-3, 4, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0, 1e-9])
def test_a_constant_has_ticks_too(value: float) -> None:
    found = ticks(value, value)
    assert found[0] <= value <= found[-1]
    assert svg_curve([(1, value), (2, value)]).count("<polyline") == 1


def test_the_curve_fills_its_frame() -> None:
    found = places(svg_curve([(1, 0.0), (2, 1.0), (3, 0.5)]))
    assert found[0] == (LEFT, HEIGHT - BOTTOM)
    assert found[1][1] == TOP
    assert found[2][0] == WIDTH - RIGHT
    assert found[2][1] == pytest.approx((TOP + HEIGHT - BOTTOM) / 2)


def test_points_that_are_not_finite_are_left_out() -> None:
    assert len(places(svg_curve([(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0)]))) == 2


@pytest.mark.parametrize("points", [[], [(1, 1.0)], [(1, float("nan")), (2, 1.0)]])
def test_less_than_two_points_are_no_curve(points: list[tuple[float, float]]) -> None:
    assert svg_curve(points) == ""


def test_long_runs_are_drawn_by_means() -> None:
    points = [(step, float(step % 2)) for step in range(10 * MOST_POINTS)]
    found = thinned(points)
    assert len(found) == MOST_POINTS
    assert {y for _, y in found} == {0.5}
    assert found[-1][0] == points[-1][0]
    assert thinned(points[:10]) == points[:10]
    assert len(svg_curve(points, smooth=True)) < 60_000


def test_smoothing_keeps_constants_and_follows_changes() -> None:
    assert smoothed([0.5] * 100) == pytest.approx([0.5] * 100)
    stair = smoothed([0.0] * 100 + [1.0] * 200)
    assert stair[99] == 0
    assert 0.3 < stair[120] < 0.8
    assert stair[-1] > 0.99
    assert smoothed([2.0]) == [2.0]


def test_the_smooth_line_lies_over_the_raw_one() -> None:
    svg = svg_curve([(step, float(step % 3)) for step in range(60)], smooth=True, title="loss by step")
    assert svg.index('"curve thin"') < svg.index('"curve"')
    assert "<title>loss by step</title>" in svg
