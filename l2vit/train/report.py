"""The end of a run for people: a summary on the console and ``report.html`` with curves."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2vit import files
from l2vit.data.bad_samples import LOG_NAME, recorded
from l2vit.errors import UserError
from l2vit.train.metrics import JSONL, Metrics, clock, read

NAME = "report.html"
_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 14, 30
_COLORS = ("#1f6f8b", "#c8553d", "#588157", "#8e6c8a", "#b08900", "#3d405b")
_TITLES = {
    "loss": "training loss (nats)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "param_norm": "parameter norm",
    "images_per_second": "images per second",
    "mfu_percent": "model FLOP utilisation (%)",
    "data_wait_percent": "time waiting for data (%)",
    "memory_gib": "memory of rank 0 (GiB)",
    "checkpoint_seconds": "seconds to write a checkpoint",
}
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;"
    "color:#222}figure{display:inline-block;margin:.4rem}figcaption{font-weight:600}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;"
    "text-align:right}td:first-child,th:first-child{text-align:left}"
)

Series = Sequence[tuple[float, float]]


def finish(run: Path, metrics: Metrics, *, main: bool, done: bool) -> None:
    """Write ``report.html`` and print the summary; rank 0 only."""
    if not main:
        return
    records = read(run / JSONL)
    try:
        files.write_text(run / NAME, page(run.name, records, done=done))
    except UserError as error:  # the run itself is saved
        metrics.say(str(error), warn=True)
    state = "finished" if done else "stopped; the same command continues it"
    told = summary(records) + _replaced(run / LOG_NAME)
    rows = "\n".join(f"  {name:32} {value}" for name, value in told)
    metrics.say(f"{run}: {state}\n{rows}\n  {'report':32} {run / NAME}")


def summary(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What is worth knowing at the end, as (name, text)."""
    if not records:
        return [("records", "none yet")]
    rows = [
        ("optimizer steps", f"{records[-1]['step']:,}"),
        ("images", f"{_last(records, 'images'):,.0f}"),
    ]
    spent = records[-1]["time"] - records[0]["time"]
    rows.append(("time since the first record", clock(max(spent, 0))))
    for key, text in (
        ("loss", "{:.4f}"),
        ("images_per_second", "{:,.1f}"),
        ("mfu_percent", "{:.1f}"),
        ("data_wait_percent", "{:.1f}"),
        ("skipped_steps", "{:.0f}"),
        ("rollbacks", "{:.0f}"),
        ("checkpoint_seconds", "{:.2f}"),
        ("memory_gib", "{:.2f}"),
    ):
        value = _last(records, key)
        if value is not None:
            rows.append((f"last {key}", text.format(value)))
    for key in sorted({key for record in records for key in record if key.endswith("_percent")}):
        if "/top" in key:
            best = max(points(records, key), key=lambda point: point[1])
            last = _last(records, key)
            rows.append((key, f"{last:.3f} (best {best[1]:.3f} at step {best[0]:,.0f})"))
    return rows


def _replaced(log: Path) -> list[tuple[str, str]]:
    """Where to read on if samples were unreadable and others took their places."""
    count = len(recorded(log))
    return [("bad samples, replaced", f"{count:,}, listed in {log}")] if count else []


def _last(records: Sequence[dict[str, Any]], key: str) -> Any:
    return next((record[key] for record in reversed(records) if key in record), None)


def points(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of every record that has a finite ``key``."""
    found = [(float(r["step"]), float(r[key])) for r in records if key in r]
    return [point for point in found if math.isfinite(point[1])]


def page(title: str, records: Sequence[dict[str, Any]], *, done: bool) -> str:
    """The report as one HTML page without any other file."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>"
        for name, text in summary(records)
    )
    keys = {key for record in records for key in record}
    figures = [
        figure(label, {key: points(records, key)}) for key, label in _TITLES.items() if key in keys
    ]
    for ending, label in (
        ("/top1_percent", "top-1 accuracy (%)"),
        ("/top5_percent", "top-5 accuracy (%)"),
        ("/loss", "evaluation loss (nats)"),
    ):
        names = sorted(key for key in keys if key.endswith(ending))
        if names:
            figures.append(
                figure(label, {n.removesuffix(ending): points(records, n) for n in names})
            )
    clamped = sorted(key for key in keys if key.startswith("clamped_percent/"))
    if clamped:
        lines = {key.partition("/")[2]: points(records, key) for key in clamped}
        figures.append(figure("denominators below the clamp (%), by layer", lines))
    state = "finished" if done else "not finished"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>This run is {state}.</p>"
        f"<table>{rows}</table>{''.join(figures)}</html>\n"
    )


def figure(title: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """One chart over steps as inline SVG."""
    shown = {name: series for name, series in lines.items() if series}
    every = [point for series in shown.values() for point in series]
    if not every:
        return ""
    low_x, high_x = _range([x for x, _ in every])
    low_y, high_y = _range([y for _, y in every])
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(point: tuple[float, float]) -> str:
        x = _LEFT + wide * (point[0] - low_x) / (high_x - low_x)
        y = _TOP + high * (high_y - point[1]) / (high_y - low_y)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for value in ticks(low_y, high_y):
        y = _TOP + high * (high_y - value) / (high_y - low_y)
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{wide}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in ticks(low_x, high_x):
        x = _LEFT + wide * (step - low_x) / (high_x - low_x)
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{step:,.0f}</text>'
        )
    for i, (name, series) in enumerate(shown.items()):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(place(point) for point in thin(series))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(series) == 1:
            across, down = place(series[0]).split(",")
            parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{color}"/>')
        if len(shown) > 1:
            parts.append(
                f'<text x="{_WIDTH - _RIGHT - 4}" y="{_TOP + 14 * (i + 1)}" fill="{color}"'
                f' text-anchor="end">{html.escape(name)}</text>'
            )
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" font-size="11" fill="#555">{"".join(parts)}'
        "</svg></figure>"
    )


def thin(series: Series, most: int = 1200) -> list[tuple[float, float]]:
    """At most about ``most`` points, evenly taken, the last one kept."""
    every = max(1, math.ceil(len(series) / most))
    kept = list(series[::every])
    if kept[-1] != series[-1]:
        kept.append(series[-1])
    return kept


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers (multiples of 1, 2 or 5 times a power of ten) in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = max(m * power for m in (1, 2, 5) if m * power <= (high - low) / 4)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [step * k for k in range(first, last + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.04 or abs(low) * 0.05 or 1.0
    return low - margin, high + margin
