"""Charts for every report: hand-drawn SVG inside a ``<figure>``, for pages of `l2vit.pages`.

Each function returns one element as text, or an empty string when there is nothing to draw. Text
and axes take the page's own colour. A chart is about as wide as a telephone and stands several in a
row on a desk, so that its letters keep their size. Line charts carry their points: the page's
script shows the values under the pointer. Equal data gives equal text.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

PALETTE = ("#2f86c6", "#d9653b", "#4c9a63", "#a675b8", "#b58a1b", "#5f7f99")
"""Colours of several series; each can be told from the background, light or dark."""

WIDTH, HEIGHT = 380, 220
_RIGHT, _TOP, _BOTTOM = 14, 10, 40
_LETTER = 6.2  # width of a digit of the axes
_MOST_POINTS = 500
_SMOOTHED_FROM = 30  # fewer points are drawn as they are


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    x_label: str = "step",
    per_epoch: float = 0.0,
    smooth: bool = False,
) -> str:
    """Curves over a common x axis; a curve of a single point is drawn as a dot.

    Args:
        title: shown above the chart.
        series: (x, y) points by name, x increasing; values that are not finite are left out.
        x_label: what the x axis counts.
        per_epoch: that many x are an epoch; the axis then tells epochs, too.
        smooth: draw long curves averaged, over the faint points themselves.
    """
    drawn = {
        name: thin([p for p in points if math.isfinite(p[1])], _MOST_POINTS)
        for name, points in series.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs, ys = ([p[i] for points in drawn.values() for p in points] for i in (0, 1))
    plot = _Plot(min(xs), max(xs), min(ys), max(ys))
    curves, carried = [], []
    for number, (name, points) in enumerate(drawn.items()):
        color = PALETTE[number % len(PALETTE)]
        curves.append(_curve(plot, points, color, number, smooth=smooth))
        carried.append({"name": name, "color": color, "points": points})
    data = {
        "x_label": x_label,
        "per_epoch": per_epoch,
        "box": [plot.left, _TOP, plot.width, plot.height],
        "range": [plot.low, plot.high],
        "series": carried,
    }
    inner = (
        plot.grid(x_label, per_epoch)
        + "".join(curves)
        + f'<line class="cross" x1="0" x2="0" y1="{_TOP}" y2="{_TOP + plot.height}"/>'
    )
    return _figure(title, _svg(title, inner, HEIGHT, focus=True), _keys(list(drawn)), data)


def histogram(
    title: str,
    counts: Sequence[float],
    edges: Sequence[float],
    *,
    x_label: str = "",
    color: str = PALETTE[0],
) -> str:
    """Bars between ``edges`` (one more than ``counts``)."""
    if not counts:
        return ""
    plot = _Plot(edges[0], edges[-1], 0.0, max(*counts, 1))
    bars = []
    for count, (start, end) in zip(counts, itertools.pairwise(edges), strict=True):
        x, y = plot.x(start), plot.y(count)
        wide = max(plot.x(end) - x - 0.5, 0.5)
        text = f"{_number(start)} to {_number(end)}: {_number(count)}"
        bars.append(_bar(x, y, wide, plot.y(0) - y, color, text))
    return _figure(title, _svg(title, plot.grid(x_label, 0.0) + "".join(bars), HEIGHT))


def bar_chart(
    title: str, pairs: Sequence[tuple[str, float]], *, color: str = PALETTE[0], unit: str = ""
) -> str:
    """Horizontal bars from top to bottom, one for each (name, value), with the value beside it."""
    if not pairs:
        return ""
    names = [name if len(name) <= 26 else f"{name[:25]}…" for name, _ in pairs]
    labels = [f"{_number(value)}{unit}" for _, value in pairs]
    left = min(max(map(len, names)) * _LETTER + 8, WIDTH * 0.48)
    room = WIDTH - left - max(map(len, labels)) * _LETTER - 10
    largest = max((value for _, value in pairs), default=0) or 1
    rows = []
    for number, ((name, value), label) in enumerate(zip(pairs, labels, strict=True)):
        y, wide = 22 * number + 4, max(value, 0) / largest * room
        rows.append(
            f'<text x="{left - 6:.1f}" y="{y + 12}" text-anchor="end">'
            f"{html.escape(names[number])}</text>"
            + _bar(left, y, wide, 16, color, f"{name}: {label}")
            + f'<text x="{left + wide + 5:.1f}" y="{y + 12}">{label}</text>'
        )
    return _figure(title, _svg(title, "".join(rows), 22 * len(pairs) + 6))


def thin(points: Points, most: int) -> list[tuple[float, float]]:
    """At most about ``most`` of the points, evenly taken, the last one kept."""
    step = max(1, math.ceil(len(points) / most))
    kept = list(points[::step])
    if kept and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def smoothed(points: Points) -> list[tuple[float, float]]:
    """An exponential average over about a thirtieth of the curve, without a bias at its start."""
    keep = 1 - 1 / max(2.0, len(points) / 30)
    total = weight = 0.0
    averaged = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        averaged.append((x, total / weight))
    return averaged


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round numbers from ``low`` to ``high``: 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(f * power for f in (1, 2, 5, 10, 20) if span / (f * power) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


class _Plot:
    """The area within the axes, and where a point lies in it."""

    def __init__(self, low: float, high: float, bottom: float, top: float) -> None:
        if bottom == top:
            pad = abs(top) * 0.1 or 1.0
            bottom, top = bottom - pad, top + pad
        if bottom:  # bars stand on their zero, curves keep off the frame
            room = 0.04 * (top - bottom)
            bottom, top = bottom - room if bottom < 0 or bottom > room else 0.0, top + room
        self.low, self.high, self.bottom, self.top = low, high, bottom, top
        self.y_ticks = ticks(bottom, top, 6)
        self.left = max(len(_number(y)) for y in self.y_ticks) * _LETTER + 8
        self.width, self.height = WIDTH - self.left - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.left + share * self.width

    def y(self, value: float) -> float:
        return _TOP + (self.top - value) / (self.top - self.bottom) * self.height

    def grid(self, x_label: str, per_epoch: float) -> str:
        floor, right = _TOP + self.height, self.left + self.width
        parts = [
            f'<line class="grid" x1="{self.left:.1f}" x2="{right:.1f}" y1="{self.y(y):.1f}"'
            f' y2="{self.y(y):.1f}"/><text x="{self.left - 5:.1f}" y="{self.y(y) + 3.5:.1f}"'
            f' text-anchor="end">{_number(y)}</text>'
            for y in self.y_ticks
        ]
        parts.append(
            f'<line class="axis" x1="{self.left:.1f}" x2="{right:.1f}" y1="{floor}" y2="{floor}"/>'
        )
        parts += self._row(ticks(self.low, self.high, 5), x_label, floor + 14, "", 1.0)
        if per_epoch:
            epochs = ticks(self.low / per_epoch, self.high / per_epoch, 6)
            parts += self._row(epochs, "epoch", floor + 29, "faint", per_epoch)
        return "".join(parts)

    def _row(
        self, values: Sequence[float], name: str, y: float, kind: str, scale: float
    ) -> list[str]:
        """Numbers below the axis, and at its right end what they count."""
        right = self.left + self.width
        taken = right - len(name) * _LETTER
        row = [f'<text class="{kind}" x="{right:.1f}" y="{y}" text-anchor="end">{name}</text>']
        for value in values:
            text, x = _number(value), self.x(value * scale)
            if x + len(text) * _LETTER / 2 < taken - 4 or not name:
                row.append(
                    f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="middle">{text}</text>'
                )
        return row


def _curve(plot: _Plot, points: Points, color: str, number: int, *, smooth: bool) -> str:
    series = f'data-series="{number}"'
    if len(points) == 1:
        x, y = plot.x(points[0][0]), plot.y(points[0][1])
        return f'<circle {series} cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>'
    if not smooth or len(points) < _SMOOTHED_FROM:
        return f'<path {series} stroke="{color}" d="{_path(plot, points)}"/>'
    return (
        f'<path class="raw" {series} stroke="{color}" d="{_path(plot, points)}"/>'
        f'<path {series} stroke="{color}" d="{_path(plot, smoothed(points))}"/>'
    )


def _path(plot: _Plot, points: Points) -> str:
    return "M" + "L".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)


def _bar(x: float, y: float, width: float, height: float, color: str, text: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{max(height, 0):.2f}"'
        f' fill="{color}"><title>{html.escape(text)}</title></rect>'
    )


def _keys(names: Sequence[str]) -> str:
    """The legend: a button a curve."""
    if len(names) < 2:
        return ""
    buttons = (
        f'<button type="button" data-series="{number}" aria-pressed="true">'
        f'<i style="background:{PALETTE[number % len(PALETTE)]}"></i>{html.escape(name)}</button>'
        for number, name in enumerate(names)
    )
    return f'<div class="keys">{"".join(buttons)}</div>'


def _svg(title: str, inner: str, height: float, *, focus: bool = False) -> str:
    focusable = ' tabindex="0"' if focus else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="{html.escape(title)}"{focusable}>{inner}</svg>'
    )


def _figure(title: str, svg: str, keys: str = "", data: Mapping[str, object] | None = None) -> str:
    carried = ""
    if data is not None:
        text = json.dumps(data, separators=(",", ":"))
        for letter in "&<>":  # neither the script nor XML may end here
            text = text.replace(letter, f"\\u{ord(letter):04x}")
        carried = f'<script type="application/json">{text}</script>'
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>{keys}{svg}{carried}'
        "</figure>"
    )


def _number(value: float) -> str:
    """Short for an axis, and exact enough: 12,345 and 0.125, 1e-05 and 2.5e+09."""
    if value and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:,.6g}" if abs(value) < 1e5 else f"{value:,.0f}"
