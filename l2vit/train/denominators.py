"""Histograms of linear attention's denominators, the vital sign of this architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from l2vit.train.distributed import World
from l2vit.train.metrics import Metrics

EDGES = tuple(10 ** (exponent / 4) for exponent in range(-8, 33))
"""Upper edges of the denominators' histogram: four a decade from 0.01 to 1e8."""


class Denominators:
    """Histograms of linear attention's denominators: the vital sign of this architecture.

    Where the share below the clamp (paper Table 10) nears 1 the attention has gone uniform;
    where none is below, the clamp does nothing.
    """

    def __init__(self, model: nn.Module, *, world: World) -> None:
        self._world = world
        self._layers = {
            name: module for name, module in model.named_modules() if hasattr(module, "observer")
        }
        self._counters = {
            name: _Counter(float(getattr(layer, "clamp", 0.0)), world.device)
            for name, layer in self._layers.items()
        }

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Within, forward passes of this rank are counted."""
        for name, layer in self._layers.items():
            layer.observer = self._counters[name]
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.observer = None

    def report(self, metrics: Metrics, step: int) -> dict[str, float]:
        """Sum over ranks, write the histograms, and return the shares clamped, in percent."""
        shares = {}
        for name, counter in self._counters.items():
            counts = self._world.sum(counter.counts.tolist())
            counter.counts.zero_()
            total, clamped = sum(counts[:-1]), counts[-1]
            if total:
                merged = [*counts[: len(EDGES) - 1], counts[len(EDGES) - 1] + counts[len(EDGES)]]
                metrics.histogram(step, f"denominators/{name}", merged, EDGES)
                shares[f"clamped_percent/{name}"] = 100 * clamped / total
        return shares


class _Counter:
    """Counts values by edge, beyond the last edge, and below the clamp.

    Only tensor operations of fixed shapes, and one object for the whole run: compiled networks
    take it into their graph, once with it and once without.
    """

    def __init__(self, clamp: float, device: torch.device) -> None:
        self._clamp = clamp
        self._edges = torch.tensor(EDGES, device=device)
        self.counts = torch.zeros(len(EDGES) + 2, dtype=torch.float64, device=device)

    def __call__(self, values: torch.Tensor) -> None:
        flat = values.detach().float().reshape(-1)
        places = torch.bucketize(flat, self._edges)
        self.counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.float64))
        self.counts[-1:].add_((flat < self._clamp).sum())
