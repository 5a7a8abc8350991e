"""Durations in one unit inside (steps) and any unit outside; the learning rate as a function."""

from __future__ import annotations

import math
from dataclasses import dataclass

from l2vit.config.values import Duration
from l2vit.data.config import EvalConfig
from l2vit.errors import ConfigError
from l2vit.train.config import CheckpointConfig, OptimConfig, ScheduleConfig


def steps_of(text: str, key: str, steps_per_epoch: int, global_batch: int) -> int:
    """Steps of the duration ``text`` found under the configuration key ``key``."""
    try:
        return Duration.parse(text).steps(steps_per_epoch, global_batch)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def interval_of(text: str, key: str, steps_per_epoch: int, global_batch: int) -> int:
    """Like ``steps_of`` for something that recurs: at least 1 step; empty text means never (0)."""
    if not text:
        return 0
    return max(1, steps_of(text, key, steps_per_epoch, global_batch))


@dataclass(frozen=True)
class Intervals:
    """Steps between things that recur; 0 means never."""

    evaluate: int
    save: int
    keep: int

    @classmethod
    def build(
        cls,
        schedule: ScheduleConfig,
        evaluation: EvalConfig,
        checkpoint: CheckpointConfig,
        *,
        steps_per_epoch: int,
    ) -> Intervals:
        """From the durations of the configuration."""

        def steps(text: str, key: str) -> int:
            return interval_of(text, key, steps_per_epoch, schedule.global_batch)

        return cls(
            evaluate=steps(evaluation.every, "eval.every"),
            save=steps(checkpoint.every, "checkpoint.every"),
            keep=steps(checkpoint.keep_every, "checkpoint.keep_every"),
        )


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay as pure functions of the optimizer step."""

    peak: float
    start: float
    lowest: float
    decay: float
    warmup: int
    """Steps of linear warm-up (W)."""
    cosine_end: int
    """Step at which the cosine (or poly) reaches ``lowest`` (T)."""
    total: int
    """All steps of the run: T and the cool-down."""
    convention: str = "paper"
    shape: str = "cosine"
    drops: tuple[int, ...] = ()
    """Shape steps: the rate is multiplied by ``factor`` from each of these steps on."""
    factor: float = 0.1
    power: float = 1.0
    warmup_ratio: float = 0.0

    @classmethod
    def build(
        cls, schedule: ScheduleConfig, optim: OptimConfig, *, steps_per_epoch: int
    ) -> Schedule:
        """The schedule of a run over a data set of ``steps_per_epoch`` global batches.

        Raises:
            ConfigError: a malformed duration, a run without steps, a warm-up longer than it.
        """

        def steps(key: str) -> int:
            text = getattr(schedule, key)
            return steps_of(text, f"schedule.{key}", steps_per_epoch, schedule.global_batch)

        warmup, length, cooldown = steps("warmup"), steps("length"), steps("cooldown")
        if length < 1:
            raise ConfigError(
                f"schedule.length: {schedule.length} is less than one step of"
                f" schedule.global_batch={schedule.global_batch} images"
            )
        if warmup > length:
            raise ConfigError(
                f"schedule.warmup: {schedule.warmup} ({warmup} steps) is longer than"
                f" schedule.length: {schedule.length} ({length} steps)"
            )
        scale = optim.scale(schedule.global_batch)
        return cls(
            peak=scale * optim.lr,
            start=scale * schedule.start_lr,
            lowest=scale * schedule.min_lr,
            decay=optim.weight_decay,
            warmup=warmup,
            cosine_end=length,
            total=length + cooldown,
            convention=schedule.convention,
            shape=schedule.shape,
            drops=tuple(
                steps_of(text, "schedule.steps", steps_per_epoch, schedule.global_batch)
                for text in schedule.steps
            ),
            factor=schedule.factor,
            power=schedule.power,
            warmup_ratio=schedule.warmup_ratio,
        )

    def lr(self, step: int) -> float:
        """Learning rate set before optimizer step ``step`` (counted from 0)."""
        if self.shape != "cosine":
            return self._decayed(step) * self._warmed(step)
        return self._swin(max(step - 1, 0)) if self.convention == "swin" else self._paper(step)

    def weight_decay(self, step: int) -> float:
        """Weight decay of step ``step``: constant in every recipe here."""
        return self.decay

    def _warmed(self, i: int) -> float:
        """The share of the rate that the warm-up allows, as mmcv's linear warm-up."""
        if i >= self.warmup:
            return 1.0
        return 1 - (1 - i / self.warmup) * (1 - self.warmup_ratio)

    def _decayed(self, i: int) -> float:
        if self.shape == "steps":
            return self.peak * self.factor ** sum(i >= drop for drop in self.drops)
        left = max(0.0, 1 - i / self.cosine_end) ** self.power
        return self.lowest + (self.peak - self.lowest) * left

    def _paper(self, i: int) -> float:
        """Warm-up reaches the peak at its last step, then the cosine begins (paper Table 9)."""
        if i < self.warmup:
            share = i / (self.warmup - 1) if self.warmup > 1 else 1.0
            return self.start + (self.peak - self.start) * share
        return self._cosine(i - self.warmup, self.cosine_end - self.warmup)

    def _swin(self, t: int) -> float:
        """The cosine counts from the first step, so it is a little below the peak at first."""
        if t < self.warmup:
            return self.start + t * (self.peak - self.start) / self.warmup
        return self._cosine(t, self.cosine_end)

    def _cosine(self, passed: int, length: int) -> float:
        if passed >= length:
            return self.lowest
        share = (1 + math.cos(math.pi * passed / length)) / 2
        return self.lowest + (self.peak - self.lowest) * share
