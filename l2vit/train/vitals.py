"""Derived measures: model FLOP utilisation, memory, and the denominators of linear attention."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from l2vit.train.clock import PhaseClock
from l2vit.train.config import LogConfig
from l2vit.train.distributed import World
from l2vit.train.metrics import Metrics

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bf16 (V100: fp16) tensor peak from the makers' data sheets, by part of the device name."""

EDGES = tuple(10 ** (exponent / 4) for exponent in range(-8, 33))
"""Upper edges of the denominators' histogram: four a decade from 0.01 to 1e8."""


def peak_tflops(config: LogConfig, device: torch.device) -> float:
    """The device's peak in TFLOP/s; 0 where it is not known."""
    if config.peak_tflops or device.type != "cuda":
        return config.peak_tflops
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def memory_gib(device: torch.device) -> float:
    """Highest memory use so far of this rank: of the GPU, or of the process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class Pace:
    """Turns a phase clock into images a second, percentages and the time left."""

    clock: PhaseClock
    global_batch: int
    flops_per_image: float
    """Forward and backward of one image."""
    peak_flops: float
    """Of all devices together; 0 where it is not known."""
    marked_at: float = 0.0
    marked_steps: int = 0
    marked_data: float = 0.0
    marked_aside: float = 0.0

    def mark(self, now: float, step: int) -> None:
        """Begin a new interval."""
        seconds = self.clock.seconds
        self.marked_at, self.marked_steps = now, step
        self.marked_data = seconds["data"]
        self.marked_aside = seconds["evaluate"] + seconds["save"]

    def measure(self, now: float, step: int, total: int) -> dict[str, float]:
        """Rates since the last mark, evaluation and saving left out; begins a new interval."""
        seconds = self.clock.seconds
        aside = seconds["evaluate"] + seconds["save"] - self.marked_aside
        wall = max(now - self.marked_at, 1e-9)
        training = max(wall - aside, 1e-9)
        steps = max(step - self.marked_steps, 1)
        rate = steps * self.global_batch / training
        values = {
            "images_per_second": rate,
            "data_wait_percent": 100 * (seconds["data"] - self.marked_data) / training,
            "seconds_left": (total - step) * wall / steps,
        }
        if self.peak_flops:
            values["mfu_percent"] = 100 * rate * self.flops_per_image / self.peak_flops
        self.mark(now, step)
        return values


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
