"""Histograms of linear attention's denominators, the vital sign of this architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

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
        self._counts: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Within, forward passes of this rank are counted."""
        for name, layer in self._layers.items():
            layer.observer = self._counter(name, float(getattr(layer, "clamp", 0.0)))
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.observer = None

    def report(self, metrics: Metrics, step: int) -> dict[str, float]:
        """Sum over ranks, write the histograms, and return the shares clamped, in percent."""
        shares = {}
        for name in self._layers:
            held = self._counts.pop(name, torch.zeros(len(EDGES) + 2))
            counts = self._world.sum(held.tolist())
            total, clamped = sum(counts[:-1]), counts[-1]
            if total:
                merged = [*counts[: len(EDGES) - 1], counts[len(EDGES) - 1] + counts[len(EDGES)]]
                metrics.histogram(step, f"denominators/{name}", merged, EDGES)
                shares[f"clamped_percent/{name}"] = 100 * clamped / total
        return shares

    def _counter(self, name: str, clamp: float) -> Callable[[torch.Tensor], None]:
        """Counts by edge, beyond the last edge, and below the clamp."""

        def observe(values: torch.Tensor) -> None:
            flat = values.detach().float().reshape(-1)
            edges = torch.tensor(EDGES, device=flat.device)
            places = torch.bucketize(flat, edges)
            counts = torch.bincount(places, minlength=len(EDGES) + 1).double()
            below = (flat < clamp).sum().double().reshape(1)
            found = torch.cat([counts, below])
            held = self._counts.get(name)
            self._counts[name] = found if held is None else held + found

        return observe
