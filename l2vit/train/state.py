"""Everything a run must remember besides its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """The counters that a checkpoint carries.

    Not here, and why: weights, moments and averages are tensors and go by name; the random state
    is not kept because every draw is a pure function of (seed, step, micro-batch) or of (seed,
    epoch, position); the loader's place is ``images_seen``; learning rates are a function of the
    step.
    """

    step: int = 0
    """Optimizer steps begun and ended, skipped ones included."""
    images_seen: int = 0
    """Images consumed; runs ahead of ``step × global batch`` after a rollback skipped some."""
    applied_steps: int = 0
    """Steps that changed the weights: AdamW's bias correction counts these."""
    skipped_steps: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    skipped_in_row: int = 0
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """What the spike detector compares with."""
    loss_scaler: dict[str, float] = field(default_factory=dict)
    """fp16 only."""
    seed: int = 0
    draws: int = 1
    """Version of the random draws, ``run.draws``; 1 in states saved before there was another."""
    order: str = ""
    """Fingerprint of the order that ``images_seen`` counts in."""
    best_accuracy: float = -1.0
    """Highest figure of ``headline`` so far, in its own unit: percent for classification, a share
    for detection and segmentation. -1 before the first evaluation."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last evaluation."""
    evaluated_step: int = -1
    """The step it was made at; -1 where that is not known."""
    headline: str = "/top1_percent"
    """The end of the figures that say which weights are better (``Task.headline``)."""
    seconds: float = 0.0
    """Time spent training, over all processes that took part one after the other."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Read what ``to_dict`` wrote."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
