"""What a run really did, under the names of the plan's predictions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l2vit.train import checkpoint

_RECORDED = ("images_per_second", "mfu_percent", "data_wait_percent", "memory_gib")


def figures(records: Sequence[Mapping[str, Any]], run: Path) -> dict[str, Any]:
    """Numbers of a run that has records, as far as it recorded them."""
    result: dict[str, Any] = {"steps": max(record["step"] for record in records)}
    for key in _RECORDED:
        series = [float(record[key]) for record in records if key in record]
        if series:  # the first records include warming up: the median does not mind
            result[key] = max(series) if key == "memory_gib" else statistics.median(series)
    if result.get("images_per_second") and records[-1].get("images"):
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


def beside(
    predicted: Mapping[str, Any], actual: Mapping[str, Any]
) -> list[tuple[str, float | None, float]]:
    """(name, predicted or None, actual) of each figure of ``actual``."""
    memory = predicted.get("memory_gib")
    if isinstance(memory, Mapping):  # by ZeRO stage; JSON has made text of the stages
        stage = predicted.get("zero_stage")
        by_stage = {str(key): value for key, value in memory.items()}
        predicted = {**predicted, "memory_gib": by_stage.get(str(stage))}
    return [(key, _positive(predicted.get(key)), value) for key, value in actual.items()]


def _positive(value: Any) -> float | None:
    return value if type(value) in (int, float) and value else None
