"""Curves over steps as inline SVG, without scripts: `svg_curve([(1, 0.52), (2, 0.48)], smooth=True)`."""

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 760, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 30  # margins, pixels
MOST_POINTS = 1000  # of a curve; longer runs are drawn by the mean of neighbours
TICKS = 5

Points = Sequence[tuple[float, float]]

STYLE = """
svg { max-width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; } .curve { fill: none; stroke: var(--ink); stroke-width: 1.8; stroke-linejoin: round; }
.thin { stroke-opacity: .45; stroke-width: 1; } .dot { fill: var(--ink); }
"""


def svg_curve(points: Points, *, smooth: bool = False, title: str = "") -> str:
    """One curve with axes; `smooth` draws the running average over the thin raw one. Empty for fewer than two finite points."""
    points = thinned([(x, y) for x, y in points if math.isfinite(y)])
    if len(points) < 2:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    rows, columns = ticks(min(ys), max(ys)), [x for x in ticks(min(xs), max(xs)) if min(xs) <= x <= max(xs)]
    low, high = min(rows[0], min(ys)), max(rows[-1], max(ys))
    across = (WIDTH - LEFT - RIGHT) / ((max(xs) - min(xs)) or 1)
    up = (HEIGHT - TOP - BOTTOM) / ((high - low) or 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - min(xs)) * across, HEIGHT - BOTTOM - (y - low) * up

    def line(values: Sequence[float], style: str) -> str:
        text = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in zip(xs, values, strict=True))
        return f'<polyline class="{style}" points="{text}"/>'

    parts = [f"<title>{title}</title>"] if title else []
    parts += [_row(place(xs[0], y)[1], f"{y:.6g}") for y in rows]
    parts += [_column(place(x, low)[0], f"{x:g}") for x in columns]
    parts += [line(ys, "curve thin"), line(smoothed(ys), "curve")] if smooth else [line(ys, "curve")]
    if len(points) <= 40:
        parts += ['<circle class="dot" r="2.2" cx="{:.1f}" cy="{:.1f}"/>'.format(*place(x, y)) for x, y in points]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(parts)}</svg>'


def _row(y: float, label: str) -> str:
    text = f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    return f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>{text}'


def _column(x: float, label: str) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>'


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that cover low..high: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    raw = span / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: the mean of neighbours, so that a spike still shows a little."""
    stride = -(-len(points) // MOST_POINTS)
    if stride <= 1:
        return list(points)
    groups = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential average over about fifty values, corrected for its start."""
    share = 2 / (min(50, max(2, len(values) / 4)) + 1)
    result, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = average + share * (value - average), weight + share * (1 - weight)
        result.append(average / weight)
    return result
