"""Charts for every report: matplotlib's SVG, ready to stand inside an HTML page.

Each function returns one ``<svg>`` element as text, or an empty string when there is nothing to
draw. Text and axes take the page's own colour, so a chart can be read on light and dark pages; the
value under the pointer shows as a tooltip; equal data gives equal text.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from l2vit.errors import UserError

Points = Sequence[tuple[float, float]]

PALETTE = ("#2f86c6", "#d9653b", "#4c9a63", "#a675b8", "#b58a1b", "#5f7f99")
"""Colours of several series; each can be told from the background, light or dark."""
STYLE = "svg.chart{max-width:100%;height:auto}"
"""CSS for a page with charts."""

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_INK = "#010203"  # drawn with this colour, then written as currentColor
_MOST_POINTS = 1200
_MOST_TOOLTIPS = 150


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    x_label: str = "step",
    log_y: bool = False,
    width: float = 5.6,
    height: float = 2.6,
) -> str:
    """Curves over a common x axis; a curve of a single point is drawn as a dot.

    Args:
        title: shown above the chart.
        series: (x, y) points by name; values that are not finite (on a log axis: not positive)
            are left out.
        x_label: what the x axis counts.
        log_y: use a logarithmic y axis.
        width: inches.
        height: inches.
    """
    shown = {name: _drawable(points, log_y) for name, points in series.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    figure, axes = _figure(title, width, height)
    tooltips = {}
    for number, (name, points) in enumerate(shown.items()):
        color = PALETTE[number % len(PALETTE)]
        dot = "o" if len(points) == 1 else ""
        xs, ys = zip(*thin(points, _MOST_POINTS), strict=True)
        axes.plot(xs, ys, color=color, marker=dot, linewidth=1.5, label=name)
        marked = thin(points, _MOST_TOOLTIPS)
        xs, ys = zip(*marked, strict=True)
        gid = f"tips{number}"
        axes.plot(xs, ys, "o", markersize=9, alpha=0, color=color, gid=gid)
        tooltips[gid] = [f"{name}, {x_label} {x:,.10g}: {y:,.6g}" for x, y in marked]
    axes.set_xlabel(x_label, loc="right")
    if all(float(x).is_integer() for points in shown.values() for x, _ in points):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_yscale("log" if log_y else "linear")
    if len(shown) > 1:
        axes.legend(frameon=False, labelcolor="linecolor", fontsize=8)
    return _svg(figure, title, tooltips)


def histogram(
    title: str,
    counts: Sequence[float],
    edges: Sequence[float],
    *,
    x_label: str = "",
    color: str = PALETTE[0],
    width: float = 4.6,
    height: float = 2.2,
) -> str:
    """Bars between ``edges`` (one more than ``counts``)."""
    if not counts:
        return ""
    figure, axes = _figure(title, width, height)
    sizes = [right - left for left, right in itertools.pairwise(edges)]
    bars = axes.bar(edges[:-1], counts, sizes, align="edge", color=color, edgecolor="none")
    tooltips = {}
    for number, bar in enumerate(bars):
        bar.set_gid(f"bar{number}")
        between = f"{edges[number]:,.6g} to {edges[number + 1]:,.6g}"
        tooltips[f"bar{number}"] = [f"{between}: {counts[number]:,.6g}"]
    axes.set_xlabel(x_label)
    return _svg(figure, title, tooltips)


def bar_chart(
    title: str,
    pairs: Sequence[tuple[str, float]],
    *,
    color: str = PALETTE[0],
    width: float = 4.6,
) -> str:
    """Horizontal bars from top to bottom, one for each (name, value), with the value beside it."""
    if not pairs:
        return ""
    figure, axes = _figure(title, width, 0.5 + 0.26 * len(pairs))
    places, values = range(len(pairs)), [value for _, value in pairs]
    bars = axes.barh(places, values, color=color, height=0.7)
    axes.bar_label(bars, [f"{value:,.6g}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(places, [_shortened(name) for name, _ in pairs])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_visible(False)
    axes.grid(False)
    tooltips = {}
    for number, (bar, (name, value)) in enumerate(zip(bars, pairs, strict=True)):
        bar.set_gid(f"bar{number}")
        tooltips[f"bar{number}"] = [f"{name}: {value:,.6g}"]
    return _svg(figure, title, tooltips)


def thin(points: Points, most: int) -> list[tuple[float, float]]:
    """At most about ``most`` of the points, evenly taken, the last one kept."""
    step = max(1, math.ceil(len(points) / most))
    kept = list(points[::step])
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def _drawable(points: Points, log_y: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y) and not (log_y and y <= 0)]


def _shortened(name: str, most: int = 28) -> str:
    # matplotlib reads text between dollar signs as a formula
    text = name if len(name) <= most else f"{name[: most - 1]}…"
    return text.replace("$", r"\$")


def _figure(title: str, width: float, height: float) -> tuple[Any, Any]:
    """An empty chart in the style all of them share."""
    try:
        from matplotlib.figure import Figure  # slow to import; most programs draw nothing
        from matplotlib.ticker import StrMethodFormatter
    except ImportError:
        raise UserError("charts need matplotlib: pip install -r requirements.txt") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=10, color=_INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
        axis.label.set(color=_INK, fontsize=8)
    axes.tick_params(colors=_INK, labelsize=8, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, title: str, tooltips: Mapping[str, Sequence[str]]) -> str:
    import matplotlib as mpl

    stream = io.BytesIO()
    in_ink = mpl.rc_context({"svg.fonttype": "none", "text.color": _INK})
    with in_ink, warnings.catch_warnings():
        # letters that matplotlib's font lacks are text in the SVG: the browser draws them
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(stream, format="svg", transparent=True)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(stream.getvalue().decode())
    for element in list(root):  # no date, and no CSS: it would apply to the whole page
        if element.tag.endswith("metadata") or element.find(f"{{{_SVG}}}style") is not None:
            root.remove(element)
    for element in root.iter(f"{{{_SVG}}}g"):
        _add_tooltips(element, tooltips.get(element.get("id", ""), ()))
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-label", title)
    text = ET.tostring(root, encoding="unicode").replace(_INK, "currentColor")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    return _with_own_ids(text)


def _add_tooltips(group: ET.Element, texts: Sequence[str]) -> None:
    """Give each marker of a curve its text, or a bar the only one."""
    markers = list(group.iter(f"{{{_SVG}}}use")) or [group]
    for marker, text in zip(markers, texts, strict=False):
        ET.SubElement(marker, f"{{{_SVG}}}title").text = text


def _with_own_ids(svg: str) -> str:
    """Rename the ids that are used and drop the rest: those of two charts on a page must differ.

    matplotlib's own are random, so they are numbered; the digest covers title and data.
    """
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
    places = {old: str(number) for number, old in enumerate(dict.fromkeys(used))}
    svg = re.sub(r'(href="#|url\(#)([^")]+)', lambda m: m[1] + "@" + places[m[2]], svg)
    svg = re.sub(
        r' id="([^"]+)"', lambda m: f' id="@{places[m[1]]}"' if m[1] in places else "", svg
    )
    digest = hashlib.sha256(svg.encode()).hexdigest()[:10]
    return re.sub(r'((?:id="|href="#|url\(#))@', rf"\g<1>c{digest}-", svg)
