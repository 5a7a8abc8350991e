"""What an optimizer step leaves behind, readable once the device has got there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from l2vit.train.distributed import PendingSum, World
from l2vit.train.engine import StepOutcome


@dataclass
class MicroBatch:
    """What is remembered of a micro-batch until its step is decided about."""

    loss: torch.Tensor
    """Scalar, on the device."""
    parts: dict[str, torch.Tensor]
    """The loss's parts by name, scalars on the device."""
    sample_ids: np.ndarray
    loaded: Any = None
    """As the loader gave it; kept only where spikes are looked for, which replays it."""


@dataclass(frozen=True)
class StepFigures:
    """A step in numbers; equal on every rank."""

    loss: float
    """Mean over the global batch."""
    parts: dict[str, float]
    stopping: bool
    """A signal asked some rank to save and stop."""
    lock_lost: bool
    """Rank 0 no longer holds the run directory."""
    ranks_written: int
    """Ranks that have written their part of the save under way."""
    grad_norm: float


@dataclass
class StepResult:
    """One optimizer step. Reading its figures may wait for the device; nothing else does."""

    step: int
    """Optimizer steps done with this one."""
    images_seen: int
    micro_batches: Sequence[MicroBatch]
    world: World
    pending: PendingSum

    @property
    def applied(self) -> bool:
        """False: not finite, and no rank changed its weights."""
        return math.isfinite(self.figures.grad_norm)

    @cached_property
    def figures(self) -> StepFigures:
        """The step in numbers; waits until the device has got there."""
        loss, stopping, lost, written, *rest = self.pending.read()
        *parts, grad_norm = rest
        size = self.world.size
        names = self.micro_batches[0].parts
        return StepFigures(
            loss=loss / size,
            parts={name: value / size for name, value in zip(names, parts, strict=True)},
            stopping=stopping > 0,
            lock_lost=lost > 0,
            ranks_written=round(written),
            grad_norm=grad_norm,
        )


def exchange(
    micro_batches: Sequence[MicroBatch],
    outcome: StepOutcome,
    *,
    stop: bool,
    lock_lost: bool,
    written: bool,
    world: World,
) -> PendingSum:
    """Begin to tell the other ranks of a step, in one tensor and without waiting.

    Args:
        micro_batches: this rank's losses.
        outcome: the gradient's norm is carried along, being equal on every rank.
        stop: this rank was asked to stop.
        lock_lost: this rank held the run directory and does no longer.
        written: this rank has written its part of the save under way.
        world: this rank's place.
    """
    losses = torch.stack([micro.loss for micro in micro_batches]).mean().double()
    parts = [
        torch.stack([micro.parts[name] for micro in micro_batches]).mean().double()
        for name in micro_batches[0].parts
    ]
    flags = [torch.full_like(losses, float(flag)) for flag in (stop, lock_lost, written)]
    norm = outcome.grad_norm.double().reshape(1)
    return world.sum_later(torch.stack([losses, *flags, *parts]), norm)
