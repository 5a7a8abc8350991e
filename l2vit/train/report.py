"""The end of a run for people: a summary on the console and ``report.html`` with curves."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2vit import charts, files
from l2vit.data.bad_samples import LOG_NAME, recorded
from l2vit.errors import UserError
from l2vit.train import history
from l2vit.train.metrics import JSONL, Metrics, clock, read

NAME = "report.html"
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
_PER_SET = {
    "/top1_percent": "top-1 accuracy (%)",
    "/top5_percent": "top-5 accuracy (%)",
    "/loss": "evaluation loss (nats)",
}
_STYLE = f"""{charts.STYLE}
:root{{color-scheme:light dark}}
body{{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem}}
svg.chart{{margin:.6rem}}
table{{border-collapse:collapse;margin-bottom:1rem}}
td{{padding:.2rem .8rem;border-bottom:1px solid #8884;text-align:right}}
td:first-child{{text-align:left}}
"""


def finish(run: Path, metrics: Metrics, *, main: bool, done: bool) -> None:
    """Write ``report.html`` and print the summary; rank 0 only."""
    if not main:
        return
    records = read(run / JSONL)
    step = records[-1]["step"] if records else 0
    history.append(run, "finished" if done else "stopped", step=step)
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
        ("images", f"{_last(records, 'images') or 0:,.0f}"),
    ]
    times = [record["time"] for record in records if "time" in record] or [0.0]
    rows.append(("time since the first record", clock(max(times[-1] - times[0], 0))))
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
        if "/top" in key and (measured := points(records, key)):
            step, best = max(measured, key=lambda point: point[1])
            last = measured[-1][1]
            rows.append((key, f"{last:.3f} (best {best:.3f} at step {step:,.0f})"))
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
    state = "finished" if done else "not finished"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>This run is {state}.</p>"
        f"<table>{rows}</table>{''.join(_charts(records))}</html>\n"
    )


def _charts(records: Sequence[dict[str, Any]]) -> list[str]:
    keys = {key for record in records for key in record}
    drawn = [(_TITLES[key], {key: points(records, key)}) for key in _TITLES if key in keys]
    for ending, title in _PER_SET.items():
        names = sorted(key for key in keys if key.endswith(ending))
        drawn.append((title, {n.removesuffix(ending): points(records, n) for n in names}))
    layers = sorted(key for key in keys if key.startswith("clamped_percent/"))
    drawn.append(
        (
            "denominators below the clamp (%), by layer",
            {key.partition("/")[2]: points(records, key) for key in layers},
        )
    )
    return [charts.line_chart(title, series) for title, series in drawn]
