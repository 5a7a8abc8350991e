"""Small SVG charts for the report: no script, no library, readable in dark and light."""

from __future__ import annotations

import html
from collections.abc import Sequence

_WIDTH, _ROW, _LABEL = 460, 24, 170


def number(value: float) -> str:
    """``14,197,122`` or ``0.52``."""
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2f}"


def rows(pairs: Sequence[tuple[str, float]], tone: str = "main") -> str:
    """Horizontal bars, one a name; nothing for no pairs."""
    if not pairs:
        return '<p class="quiet">none</p>'
    top = max(value for _, value in pairs) or 1
    height = _ROW * len(pairs)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">']
    for place, (name, value) in enumerate(pairs):
        y = place * _ROW
        length = max(2.0, (_WIDTH - _LABEL - 80) * value / top)
        shown = name if len(name) <= 24 else f"{name[:23]}…"
        parts.append(
            f'<text x="{_LABEL - 8}" y="{y + 16}" text-anchor="end">{html.escape(shown)}'
            f"<title>{html.escape(name)}</title></text>"
            f'<rect class="{tone}" x="{_LABEL}" y="{y + 4}" width="{length:.1f}"'
            f' height="{_ROW - 8}" rx="3"/>'
            f'<text class="value" x="{_LABEL + length + 6:.1f}" y="{y + 16}">{number(value)}</text>'
        )
    return "".join([*parts, "</svg>"])


def histogram(counts: Sequence[int], edges: Sequence[float], what: str) -> str:
    """Vertical bars over ``edges`` (one more than ``counts``), first and last edge labelled."""
    width, height, base = _WIDTH, 160, 120
    top = max(counts, default=0) or 1
    step = width / max(len(counts), 1)
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">']
    for place, count in enumerate(counts):
        tall = (base - 14) * count / top
        title = f"{number(edges[place])} to {number(edges[place + 1])}: {count:,}"
        parts.append(
            f'<rect class="main" x="{place * step + 1:.1f}" y="{base - tall:.1f}"'
            f' width="{step - 2:.1f}" height="{tall:.1f}" rx="2"><title>{title}</title></rect>'
        )
    middle = edges[len(edges) // 2]
    parts.append(
        f'<line x1="0" y1="{base}" x2="{width}" y2="{base}"/>'
        f'<text x="0" y="{base + 16}">{number(edges[0])}</text>'
        f'<text x="{width / 2}" y="{base + 16}" text-anchor="middle">{number(middle)}</text>'
        f'<text x="{width}" y="{base + 16}" text-anchor="end">{number(edges[-1])}</text>'
        f'<text class="quiet" x="{width / 2}" y="{base + 34}" text-anchor="middle">{what};'
        f" tallest bar {top:,}</text></svg>"
    )
    return "".join(parts)
