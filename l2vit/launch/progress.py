"""How far a run has come, read from its directory alone."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

COMPLETE = "checkpoint.json"
"""Written last into a checkpoint, so a directory that has one is complete."""
_TAIL = 1 << 16


@dataclass(frozen=True, order=True)
class Reached:
    """The last step recorded and the last step saved; ordered by what was trained."""

    step: int
    saved: int

    def __str__(self) -> str:
        return f"step {self.step} (last complete checkpoint: step {self.saved})"


def reached(run_dir: Path) -> Reached:
    """How far the run in ``run_dir`` has come; zeros for a run that has not begun."""
    saved = max((_step(path) for path in _complete(run_dir)), default=0)
    return Reached(step=max(saved, _last_recorded(run_dir / "metrics.jsonl")), saved=saved)


def _complete(run_dir: Path) -> list[Path]:
    found = run_dir.glob(f"checkpoints/step-*/{COMPLETE}")
    return [path.parent for path in found if path.parent.name[5:].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def _last_recorded(metrics: Path) -> int:
    try:
        with metrics.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
            lines = stream.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by the failure, or one that is not about a step
    return 0
