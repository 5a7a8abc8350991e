"""Several runs side by side: how far each has come, and their curves over one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from l2vit import pages
from l2vit.errors import UserError
from l2vit.train import report_charts
from l2vit.train.metrics import JSONL
from l2vit.train.run_record import RunRecord

_HEAD = ("run", "state", "step", "left", "last record", "loss", "accuracy", "images/s")


def find(directory: Path) -> list[RunRecord]:
    """The runs in ``directory``, at any depth, or the run that it is itself, by name.

    Raises:
        UserError: there is none.
    """
    found = sorted(path.parent for path in directory.rglob(JSONL))
    if not found:
        raise UserError(f"no runs in {directory}: no {JSONL} in it or below")
    return [
        RunRecord.load(run, str(run.relative_to(directory)) if run != directory else "")
        for run in found
    ]


def table(runs: Sequence[RunRecord], now: float | None = None) -> str:
    """Aligned columns, one line a run."""
    rows = [_HEAD, *(run.row(now) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def page(runs: Sequence[RunRecord], now: float | None = None) -> str:
    """The runs' curves over one another, as one HTML page."""
    rows = pages.table(_HEAD, [run.row(now) for run in runs])
    body = f"<h1>Runs</h1>{pages.section('How far they are', rows)}"
    return pages.document("Runs", body + report_charts.sections(runs))
