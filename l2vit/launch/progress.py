"""How far a run has come, read from its directory alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from l2vit.train import checkpoint, metrics

DONE = "DONE"


@dataclass(frozen=True)
class Reached:
    """The last step recorded and the last step saved; 0 where there is none."""

    step: int
    saved: int

    def __str__(self) -> str:
        return f"step {self.step} (last complete checkpoint: step {self.saved})"


def reached(run_dir: Path) -> Reached:
    """How far the run in ``run_dir`` has come; zeros for a run that has not begun."""
    saved = max(checkpoint.complete_steps(run_dir), default=0)
    recorded = (int(record["step"]) for record in metrics.read(run_dir / metrics.JSONL))
    return Reached(step=max(recorded, default=saved), saved=saved)


def finished(run_dir: Path, length: Sequence[str]) -> bool:
    """Whether ``DONE`` says that the run reached ``length`` (schedule.length, .cooldown).

    A run may be made longer after it has finished: then an old ``DONE`` proves nothing.
    """
    try:
        return list(json.loads((run_dir / DONE).read_text())["length"]) == list(length)
    except (OSError, ValueError, KeyError, TypeError):
        return False
