"""How well the features tell classes apart: k nearest neighbours, with no training at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2vit.data.batch import Batch
from l2vit.errors import UserError

TEMPERATURE = 0.07
"""As DINO scores features (arXiv 2104.14294): 20 neighbours of weight exp(similarity / T)."""
_AT_ONCE = 256
"""Queries that are compared with the whole bank at a time."""


@dataclass(frozen=True)
class Bank:
    """Features of pictures whose classes are known."""

    features: Tensor
    """(N, C) fp32 of length 1."""
    labels: Tensor
    """(N,) int64."""


def features(model: nn.Module, batches: Iterable[Batch], dtype: torch.dtype | None) -> Bank:
    """What the classifier of ``model`` is given, for every picture, scaled to length 1.

    Args:
        model: of timm, in evaluation mode, on the batches' device.
        batches: pictures and labels.
        dtype: of autocast; None for fp32.

    Raises:
        UserError: the model has no classifier to stop before, or there are no pictures.
    """
    if not hasattr(model, "forward_head"):
        raise UserError(f"--knn: {type(model).__name__} has no features before its classifier")
    found, labels = [], []
    with torch.inference_mode():
        for batch in batches:
            with torch.autocast(batch.images.device.type, dtype, enabled=dtype is not None):
                maps = model.forward_features(batch.images)  # type: ignore[operator]
                pooled = model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
            found.append(F.normalize(pooled.float().flatten(1)))
            labels.append(batch.labels)
    if not found:
        raise UserError("--knn: no pictures to take features of")
    return Bank(torch.cat(found), torch.cat(labels))


def votes(bank: Bank, queries: Tensor, *, classes: int, neighbours: int) -> Tensor:
    """(Q, classes) summed weights of each query's nearest neighbours, by their class.

    A neighbour of cosine similarity s weighs exp(s / 0.07).

    Args:
        bank: pictures with known classes, N of them.
        queries: (Q, C) fp32 of length 1.
        classes: how many there are.
        neighbours: at most so many; fewer where the bank is smaller.
    """
    nearest = min(neighbours, len(bank.labels))
    rows = []
    for part in queries.split(_AT_ONCE):
        similarity, place = (part @ bank.features.T).topk(nearest, dim=1)
        weights = (similarity / TEMPERATURE).exp()
        row = torch.zeros(len(part), classes, device=part.device)
        rows.append(row.scatter_add_(1, bank.labels[place], weights))
    return torch.cat(rows)
