"""Exponential moving average of the fp32 master weights, each rank keeping its own part.

Averaging the bf16 weights instead would not work: at decay 0.9999 the change of a step is below
half a unit in the last place, so a bf16 average never moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_SMALL = 1 << 16
"""Elements of tensors that are better averaged together, at the price of a copy."""


class Ema:
    """Moving averages of a fixed list of fp32 tensors, updated once per optimizer step."""

    def __init__(
        self, sources: Sequence[torch.Tensor], decay: float, *, warmup: bool = False
    ) -> None:
        self.sources = [source.detach() for source in sources]
        self.averages = [source.clone() for source in self.sources]
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, applied_steps: int) -> None:
        """average ← d · average + (1 − d) · source, in place.

        Args:
            applied_steps: how often the sources have changed; the warm-up lets d grow with it.
        """
        if self.averages:
            weight = 1 - self.decay_at(applied_steps)
            torch._foreach_lerp_(self.averages, self.sources, weight=weight)

    @torch.no_grad()
    def update_unless(self, skipped: torch.Tensor, applied_steps: torch.Tensor) -> None:
        """Like ``update`` where ``skipped`` is 0, nothing where it is 1; scalars on the device."""
        decay = torch.full_like(applied_steps, self.decay, dtype=torch.float64)
        if self.warmup:
            decay = torch.minimum(decay, (1 + applied_steps.double()) / (10 + applied_steps))
        weight = ((1 - decay) * (1 - skipped)).float()
        pairs = list(zip(self.averages, self.sources, strict=True))
        for average, source in pairs:
            if average.numel() > _SMALL:
                average.lerp_(source, weight)
        few = [pair for pair in pairs if pair[0].numel() <= _SMALL]
        if few:
            averages, sources = map(list, zip(*few, strict=True))
            steps = torch._foreach_sub(sources, averages)
            torch._foreach_mul_(steps, weight)
            torch._foreach_add_(averages, steps)

    def decay_at(self, applied_steps: int) -> float:
        """The decay d after so many applied steps."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + applied_steps) / (10 + applied_steps))

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the sources' present values."""
        for average, source in zip(self.averages, self.sources, strict=True):
            average.copy_(source)
