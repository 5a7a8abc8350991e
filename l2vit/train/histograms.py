"""Histograms of the parameters for TensorBoard, counted where ZeRO keeps them."""

from __future__ import annotations

import torch

from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.metrics import Metrics

_POSITIVE = [10 ** (power / 4) for power in range(-24, 9)]
EDGES = (*(-edge for edge in reversed(_POSITIVE)), 0.0, *_POSITIVE)
"""From -100 over 0 to 100, closer together around 0."""


def log_parameters(engine: Engine, metrics: Metrics, step: int, world: World) -> None:
    """Write one histogram a parameter, of its fp32 values; every rank calls this."""
    names = [name for name, _ in engine.module.named_parameters()]
    counts = torch.zeros(len(names), len(EDGES), dtype=torch.float64)
    row = {f"param/{name}": number for number, name in enumerate(names)}
    for key, _, values in engine.tensors():
        if key in row:
            counts[row[key]] += count(values).cpu()
    summed = torch.tensor(world.sum(counts.flatten().tolist())).view_as(counts)
    for name, found in zip(names, summed.tolist(), strict=True):
        metrics.histogram(step, f"parameters/{name}", found, EDGES)


def count(values: torch.Tensor) -> torch.Tensor:
    """How many values lie above the edge before and up to each edge; beyond the ends, in the end's.

    NaN counts as beyond the last edge.
    """
    edges = torch.tensor(EDGES, device=values.device)
    places = torch.bucketize(values.detach().float().flatten(), edges).clamp(max=len(EDGES) - 1)
    return torch.bincount(places, minlength=len(EDGES)).double()
