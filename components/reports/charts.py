"""Line charts as inline SVG: coloured by the page's style sheet, with values shown under the pointer by report.js.

A series has the colour of its slot (`.s0`, `.s1`, … in report.css), so that a run has one colour in all charts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 400, 260  # viewBox, which the page scales
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 40  # margins around the plotted frame
MAX_POINTS = 160  # per series: one for every second pixel of the frame
SLOTS = 6  # number of colours; they repeat from the seventh series on


@dataclass(frozen=True)
class Series:
    """One line: x is ascending, y may have gaps (NaN)."""

    name: str
    slot: int
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """Axis of a chart: label, bounds, linear or logarithmic scale."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Convert values to fractions of the axis, clipped to it."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            values = np.log10(np.maximum(values, self.low))
        else:
            low, high = self.low, self.high
        return np.clip((values - low) / (high - low), 0, 1)

    def ticks(self) -> list[float]:
        """Choose about four to seven round numbers within the bounds."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            factors = (1, 2, 5) if self.high / self.low < 300 else (1,)
            candidates = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        else:
            step = _round_up((self.high - self.low) / 6)
            first = math.ceil(self.low / step - 1e-9)
            candidates = [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [tick for tick in candidates if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Draw a chart as SVG; its accessible name has the title and the last value of each line."""
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_summary(title, series))}">',
        _grid(x, y),
        *(_line(one, x, y) for one in series),
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/>',
        "</svg>",
    ]
    return "".join(parts)


def thinned(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Reduce a long series to means over equal stretches, which also removes noise; a short one is unchanged."""
    if len(x) <= limit:
        return list(x), list(y)
    stretches = np.array_split(np.arange(len(x)), limit)
    values = np.asarray(y, dtype=float)
    return [float(x[part[-1]]) for part in stretches], [_mean(values[part]) for part in stretches]


def positive_bounds(series: Sequence[Series]) -> tuple[float, float]:
    """Bounds of a logarithmic axis for all positive values."""
    values = np.concatenate([np.asarray(one.y, dtype=float) for one in series])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return 0.1, 1.0
    low, high = float(values.min()), float(values.max())
    return low / 1.1, max(high, low * 1.2) * 1.1


def _mean(values: np.ndarray) -> float:
    present = values[np.isfinite(values)]
    return float(present.mean()) if present.size else math.nan


def _summary(title: str, series: Sequence[Series]) -> str:
    lasts = [f"{one.name} ends at {_number(one.y[-1])}" for one in series if len(one.y)]
    return f"{title}: {'; '.join(lasts)}" if lasts else title


def _grid(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick, position in zip(y.ticks(), _down(y, y.ticks()), strict=True):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{position:.1f}" y2="{position:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{position + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick, position in zip(x.ticks(), _across(x, x.ticks()), strict=True):
        parts.append(f'<line class="grid" x1="{position:.1f}" x2="{position:.1f}" y1="{TOP}" y2="{bottom}"/>')
        anchor = "end" if position > right - 8 else "middle"
        parts.append(
            f'<text class="tick" x="{position:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{_number(tick)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    return "".join(parts)


def _line(series: Series, x: Axis, y: Axis) -> str:
    """Draw a polyline, with its values as attributes for report.js."""
    kept = [(a, b) for a, b in zip(series.x, series.y, strict=True) if math.isfinite(b)]
    xs, ys = [a for a, _ in kept], [b for _, b in kept]
    pixels = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(_across(x, xs), _down(y, ys), strict=True))
    values = f'data-x="{" ".join(map(_number, xs))}" data-y="{" ".join(map(_number, ys))}"'
    name = escape(series.name)
    return (
        f'<polyline class="line s{series.slot % SLOTS}" data-name="{name}" {values} points="{pixels}">'
        f"<title>{name}</title></polyline>"
    )


def _across(axis: Axis, values: Sequence[float]) -> list[float]:
    return (LEFT + axis.place(np.asarray(values, dtype=float)) * (WIDTH - LEFT - RIGHT)).tolist()


def _down(axis: Axis, values: Sequence[float]) -> list[float]:
    return (HEIGHT - BOTTOM - axis.place(np.asarray(values, dtype=float)) * (HEIGHT - TOP - BOTTOM)).tolist()


def _round_up(value: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 or value != int(value) else f"{int(value)}"
