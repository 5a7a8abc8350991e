"""What a run really did, beside what was predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l2vit.errors import UserError
from l2vit.train import measured as of_run
from l2vit.train import metrics


def measured(run: Path) -> dict[str, Any]:
    """Numbers of a run under the names of ``report.values``, as far as it recorded them.

    Raises:
        UserError: the directory holds no records.
    """
    records = metrics.read(run / metrics.JSONL)
    if not records:
        raise UserError(f"{run} holds no records ({metrics.JSONL}): nothing to compare with")
    return of_run.figures(records, run)


def text(predicted: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """A table of both; the ratio is actual over predicted."""
    lines = [f"{'':<22}{'predicted':>14}{'actual':>14}{'ratio':>9}"]
    for key, before, value in of_run.beside(predicted, actual):
        if before is not None:
            lines.append(f"{key:<22}{before:>14,.4g}{value:>14,.4g}{value / before:>9.2f}")
        else:
            lines.append(f"{key:<22}{'-':>14}{value:>14,.4g}{'':>9}")
    return "\n".join(lines)
