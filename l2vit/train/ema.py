"""Exponential moving average of the fp32 master weights, each rank keeping its own part.

Averaging the bf16 weights instead would not work: at decay 0.9999 the change of a step is below
half a unit in the last place, so a bf16 average never moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Ema:
    """Moving averages of a fixed list of fp32 tensors, updated once per optimizer step."""

    def __init__(self, sources: Sequence[torch.Tensor], decay: float) -> None:
        self.sources = [source.detach() for source in sources]
        self.averages = [source.clone() for source in self.sources]
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """average ← decay · average + (1 − decay) · source, in place."""
        if self.averages:
            torch._foreach_lerp_(self.averages, self.sources, weight=1 - self.decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the sources' present values."""
        for average, source in zip(self.averages, self.sources, strict=True):
            average.copy_(source)
