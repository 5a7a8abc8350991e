"""Several runs side by side: how far each has come, and their curves over one another."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2vit import charts
from l2vit.config import read_tree
from l2vit.errors import ConfigError, UserError
from l2vit.train.metrics import JSONL, clock, read
from l2vit.train.report import points

_CURVES = {
    "loss": "training loss (nats)",
    "learning_rate": "learning rate",
    "images_per_second": "images per second",
}
_HEAD = ("run", "state", "step", "left", "last record", "loss", "accuracy", "images/s")


@dataclass
class Overview:
    """What a run directory says about itself."""

    name: str
    finished: bool
    records: list[dict[str, Any]] = field(repr=False)

    @property
    def accuracies(self) -> list[str]:
        """The keys of top-1 accuracies, the main set's first."""
        keys = {k for record in self.records for k in record if k.endswith("/top1_percent")}
        return sorted(keys, key=lambda key: (not key.startswith("val"), key))

    def last(self, key: str) -> Any:
        """The newest value of ``key``; None if there is none."""
        return next((r[key] for r in reversed(self.records) if key in r), None)

    def as_dict(self, now: float) -> dict[str, Any]:
        """The row of the table, as values for programs."""
        written = self.last("time")
        return {
            "run": self.name,
            "state": "finished" if self.finished else "not finished",
            "step": self.last("step") or 0,
            "seconds_left": 0.0 if self.finished else self.last("seconds_left"),
            "seconds_since_record": None if written is None else max(0.0, now - written),
            "loss": self.last("loss"),
            "top1_percent": {
                k.removesuffix("/top1_percent"): self.last(k) for k in self.accuracies
            },
            "images_per_second": self.last("images_per_second"),
        }

    def row(self, now: float) -> tuple[str, ...]:
        """The row of the table, for people."""
        found = self.as_dict(now)
        accuracy = ", ".join(f"{k} {v:.2f}%" for k, v in found["top1_percent"].items())
        left, age = found["seconds_left"], found["seconds_since_record"]
        return (
            self.name,
            found["state"],
            f"{found['step']:,}",
            "-" if not left else clock(left),
            "-" if age is None else f"{clock(age)} ago",
            _number(found["loss"], ".4f"),
            accuracy or "-",
            _number(found["images_per_second"], ",.1f"),
        )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def find(directory: Path) -> list[Overview]:
    """The runs in ``directory``, at any depth, or the run that it is itself, by name.

    Raises:
        UserError: there is none.
    """
    found = sorted(path.parent for path in directory.rglob(JSONL))
    if not found:
        raise UserError(f"no runs in {directory}: no {JSONL} in it or below")
    return [_overview(path, directory) for path in found]


def _overview(run: Path, root: Path) -> Overview:
    name = str(run.relative_to(root)) if run != root else run.resolve().name
    return Overview(name, _finished(run), read(run / JSONL))


def _finished(run: Path) -> bool:
    """``DONE`` is there and speaks of the length that the configuration has now."""
    try:
        done = json.loads((run / "DONE").read_text())["length"]
        schedule = read_tree(run / "config.yaml")["schedule"]
        return bool(done == [schedule["length"], schedule.get("cooldown", "0 epochs")])
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return False


def table(runs: Sequence[Overview], now: float | None = None) -> str:
    """Aligned columns, one line a run."""
    at = time.time() if now is None else now
    rows = [_HEAD, *(run.row(at) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def page(runs: Sequence[Overview]) -> str:
    """The runs' curves over one another, as one HTML page."""
    drawn = [(title, key) for key, title in _CURVES.items()]
    keys = sorted({key for run in runs for key in run.accuracies})
    drawn += [(f"top-1 accuracy on {key.partition('/')[0]} (%)", key) for key in keys]
    figures = [
        charts.line_chart(title, {run.name: points(run.records, key) for run in runs})
        for title, key in drawn
    ]
    style = (
        f"{charts.STYLE}:root{{color-scheme:light dark}}"
        "body{font:15px/1.45 system-ui,sans-serif;margin:2rem;}pre{overflow-x:auto}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs</title>'
        f"<style>{style}</style><h1>Runs</h1><pre>{html.escape(table(runs))}</pre>"
        f"{''.join(figures)}</html>\n"
    )
