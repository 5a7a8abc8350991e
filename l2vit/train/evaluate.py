"""Exact evaluation: every image counted once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from l2vit.data.batch import Batch

Observer = Callable[[torch.Tensor, torch.Tensor, np.ndarray], None]
"""Called with logits (B, classes), labels (B,) and sample ids (B,) of each batch of this rank."""


@dataclass(frozen=True)
class Tally:
    """Sums over an evaluation set."""

    count: int
    top1: int
    """Images whose label has the highest logit."""
    top5: int
    loss: float
    """Cross-entropy summed over the images, in nats."""

    @property
    def top1_percent(self) -> float:
        return 100 * self.top1 / max(self.count, 1)

    @property
    def top5_percent(self) -> float:
        return 100 * self.top5 / max(self.count, 1)

    @property
    def mean_loss(self) -> float:
        return self.loss / max(self.count, 1)


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    loader: Iterable[Batch],
    *,
    world: Any,
    observe: Observer | None = None,
) -> Tally:
    """Run ``forward`` over ``loader`` and sum over all ranks.

    A rank whose batch is empty computes one blank image all the same: under ZeRO-3 every rank
    must take part in gathering the weights.

    Args:
        forward: images (B, 3, H, W) to logits (B, classes), in evaluation mode.
        loader: this rank's share; the same number of batches on every rank.
        world: a ``World`` (``sum`` is used).
        observe: sees each batch's outcome on its own rank.
    """
    sums: torch.Tensor | None = None
    count = 0
    for batch in loader:
        if not len(batch):
            forward(batch.images.new_zeros((1, *batch.images.shape[1:])))
            continue
        logits = forward(batch.images).float()
        count += len(batch)
        outcome = _sums(logits, batch.labels)
        sums = outcome if sums is None else sums + outcome
        if observe is not None:
            observe(logits, batch.labels, batch.sample_ids)
    own = [0.0, 0.0, 0.0] if sums is None else sums.tolist()
    total, top1, top5, loss = world.sum([count, *own])
    return Tally(int(total), int(top1), int(top5), loss)


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """float64 (top-1 hits, top-5 hits, summed loss), still on the device."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    return torch.stack([hits[:, 0].double().sum(), hits.double().sum(), loss])
