"""What a run really did, beside what was predicted."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l2vit.errors import UserError
from l2vit.train import checkpoint, metrics

_MEASURED = ("images_per_second", "mfu_percent", "data_wait_percent", "memory_gib")


def measured(run: Path) -> dict[str, Any]:
    """Numbers of a run under the names of ``report.values``, as far as it recorded them.

    Raises:
        UserError: the directory holds no records.
    """
    records = metrics.read(run / metrics.JSONL)
    if not records:
        raise UserError(f"{run} holds no records ({metrics.JSONL}): nothing to compare with")
    result: dict[str, Any] = {"steps": max(record["step"] for record in records)}
    for key in _MEASURED:
        series = [float(record[key]) for record in records if key in record]
        if series:  # the first records include warming up: the median does not mind
            result[key] = max(series) if key == "memory_gib" else statistics.median(series)
    if "images_per_second" in result:
        batch = records[-1]["images"] / records[-1]["step"]
        result["step_seconds"] = batch / result["images_per_second"]
    times = [float(record["time"]) for record in records if "time" in record]
    if len(times) > 1:
        result["days"] = (times[-1] - times[0]) / 86400
    steps = checkpoint.complete_steps(run)
    if steps:
        folder = checkpoint.step_directory(run, steps[-1])
        size = sum(path.stat().st_size for path in folder.iterdir())
        result["checkpoint_gib"] = size / 2**30
        result["checkpoints_kept"] = len(steps)
    return result


def text(predicted: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """A table of both; the ratio is actual over predicted."""
    stage = predicted["zero_stage"]
    flat = {**predicted, "memory_gib": predicted["memory_gib"][stage]}
    lines = [f"{'':<22}{'predicted':>14}{'actual':>14}{'ratio':>9}"]
    for key, value in actual.items():
        before = flat.get(key)
        if isinstance(before, int | float) and before:
            lines.append(f"{key:<22}{before:>14,.4g}{value:>14,.4g}{value / before:>9.2f}")
        else:
            lines.append(f"{key:<22}{'-':>14}{value:>14,.4g}{'':>9}")
    return "\n".join(lines)
