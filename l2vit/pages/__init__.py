"""The frame of every HTML page: one style, light and dark, and no file besides the page.

Whatever comes from a file goes through `shown`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources


def document(title: str, body: str, *, style: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML.
        style: CSS that this page alone needs.
    """
    interactive = '<script type="application/json">' in body
    script = f"<script>{_text('charts.js')}</script>" if interactive else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{shown(title)}</title><style>{_text('style.css')}{style}</style>"
        f"<main>{body}</main>{script}</html>\n"
    )


def _text(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text("utf-8")


def shown(text: str) -> str:
    """``text`` as HTML; bytes of file names that are no UTF-8 become question marks."""
    return html.escape(text.encode("utf-8", "replace").decode())


def section(title: str, body: str) -> str:
    """A titled box; nothing if ``body`` is empty."""
    return f"<section><h2>{shown(title)}</h2>{body}</section>" if body else ""


def cards(pairs: Iterable[tuple[str, str]]) -> str:
    """A row of boxes, each with a large value and what it is."""
    boxes = (
        f'<div class="card"><b>{shown(value)}</b><span>{shown(what)}</span></div>'
        for value, what in pairs
    )
    return f'<div class="cards">{"".join(boxes)}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A table of names and values; empty values are left out."""
    rows = "".join(
        f"<tr><td>{shown(name)}</td><td>{shown(value)}</td></tr>" for name, value in pairs if value
    )
    return f'<table class="facts">{rows}</table>' if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "figures") -> str:
    """A table with a head; wider than the page it scrolls by itself."""
    lines = "".join(
        "<tr>" + "".join(f"<td>{shown(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    names = "".join(f"<th>{shown(name)}</th>" for name in head)
    return f'<div class="wide"><table class="{kind}"><tr>{names}</tr>{lines}</table></div>'


def pill(text: str, kind: str = "") -> str:
    """A word in a coloured oval; ``kind`` is good, warn or bad."""
    return f'<span class="pill {kind}">{shown(text)}</span>'
