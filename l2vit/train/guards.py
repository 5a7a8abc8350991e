"""What may go wrong between two steps: signals, non-finite numbers, spikes of the loss."""

from __future__ import annotations

import json
import math
import signal
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image

from l2vit.data.contact_sheet import contact_sheet
from l2vit.errors import UserError
from l2vit.train.config import FaultsConfig
from l2vit.train.distributed import World
from l2vit.train.state import TrainState
from l2vit.train.step import StepResult

STOPPED = 75
"""Exit status of a run that saved and stopped because of a signal: run it again (EX_TEMPFAIL)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
NONFINITE = "nonfinite.jsonl"
SPIKES = "spikes"
SPIKE_WINDOW = 100
"""Losses the running median is taken over."""
SPIKE_WARMUP = 20
"""Losses needed before a spike can be called one."""
MAX_ROLLBACKS = 5
"""Rollbacks to one checkpoint before the run gives up."""
_SHEET_IMAGES = 64


class StopSignal:
    """Remembers that SIGTERM or SIGUSR1 (Slurm's warning) arrived; the loop acts on it."""

    def __init__(self) -> None:
        self.arrived = False
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.arrived = True

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def record_nonfinite(
    run: Path, world: World, result: StepResult, keys_of: Callable[[list[int]], list[str]]
) -> None:
    """Write the step's samples that gave a non-finite loss, of all ranks, to nonfinite.jsonl.

    Where every loss was finite and only the gradient was not, all samples of the step are
    written: any of them may be the cause.
    """
    own = [(float(micro.loss), micro.sample_ids.tolist()) for micro in result.micro_batches]
    everywhere = world.gather(own)
    if not world.main:
        return
    bad = [not math.isfinite(loss) for rank in everywhere for loss, _ in rank]
    with (run / NONFINITE).open("a") as stream:
        for rank, losses in enumerate(everywhere):
            for loss, ids in losses:
                if not math.isfinite(loss) or not any(bad):
                    line = {
                        "step": result.step,
                        "rank": rank,
                        "loss": str(loss),
                        "sample_ids": ids,
                        "keys": keys_of(ids),
                    }
                    stream.write(json.dumps(line) + "\n")


def count_skipped(
    state: TrainState, *, step: int, applied: bool, scaling: bool, limit: int, run: Path
) -> None:
    """Count a step; stop a run whose steps are skipped again and again.

    Args:
        state: its counters are brought up to date.
        step: the step's number, for the message.
        applied: whether the step changed the weights.
        scaling: the loss was finite and only fp16's loss scale was too high: not a fault.
        limit: how many steps in a row may be skipped.
        run: named in the error.

    Raises:
        UserError: more than ``limit`` in a row.
    """
    if applied:
        state.skipped_in_row = 0
        return
    state.skipped_steps += 1
    if not scaling:
        state.skipped_in_row += 1
    if state.skipped_in_row > limit:
        raise UserError(
            f"{state.skipped_in_row} steps in a row were skipped for a non-finite loss or gradient"
            f" (step {step}; faults.max_nonfinite={limit}); the samples are in"
            f" {run / NONFINITE}; try a lower optim.lr or engine.precision=fp32"
        )


def is_spike(loss: float, state: TrainState, config: FaultsConfig) -> bool:
    """Whether ``loss`` is far above the running median; remembers it if not."""
    if not config.spike_factor or not math.isfinite(loss):
        return False
    recent = state.recent_losses
    if len(recent) >= SPIKE_WARMUP and loss > config.spike_factor * statistics.median(recent):
        return True
    recent.append(loss)
    del recent[:-SPIKE_WINDOW]
    return False


def save_spike(run: Path, world: World, result: StepResult, images: np.ndarray) -> Path:
    """Write the contact sheet and the sample ids of the step whose loss jumped.

    Args:
        run: the run directory.
        world: this rank's place; every rank calls this.
        result: the step.
        images: (N, H, W, 3) uint8, this rank's.

    Returns:
        The picture's path: ``spikes/step-NNNNNNNN.png``, the ids beside it as ``.json``.
    """
    share = max(1, _SHEET_IMAGES // world.size)
    gathered = world.gather(
        (images[:share], [micro.sample_ids.tolist() for micro in result.micro_batches])
    )
    path = run / SPIKES / f"step-{result.step:08d}.png"
    if world.main:
        path.parent.mkdir(exist_ok=True)
        sheet = contact_sheet(np.concatenate([part for part, _ in gathered]))
        Image.fromarray(sheet).save(path)
        listed = {
            "step": result.step,
            "images_seen": result.images_seen,
            "sample_ids_by_rank": [part for _, part in gathered],
        }
        path.with_suffix(".json").write_text(json.dumps(listed) + "\n")
    return path
