"""Where a rank is, how its time is spent, and how fast the run goes."""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from l2vit.train.config import LogConfig

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

PHASES = ("setup", "data", "mix", "forward", "backward", "reduce", "save", "evaluate", "log")


training_began = threading.Event()
"""Set when this process enters the first phase of its first step."""


@dataclass(frozen=True)
class Place:
    """Where a rank is. Ranks pass the same places in the same order, so counts compare."""

    count: int
    """Phases entered and beats made so far."""
    phase: str
    step: int
    waiting: bool = False
    """Whether it stands in a collective, that is, waits for other ranks."""


class PhaseClock:
    """Times the phases of a run and tells the watchdog where this rank is."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._place = Place(0, "setup", 0)
        self._since = self._lap = time.monotonic()
        self.step = 0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Be in ``phase`` (one of ``PHASES``) within."""
        began = self._enter(phase)
        try:
            yield
        finally:
            self.seconds[phase] += time.monotonic() - began

    def lap(self) -> float:
        """Seconds since the last lap, or since the clock was made."""
        before, self._lap = self._lap, time.monotonic()
        return self._lap - before

    def beat(self) -> None:
        """Tell of progress within the phase: one that takes long, as an evaluation may, is no hang.

        Ranks beat equally often, too.
        """
        self._enter(self._place.phase)

    def _enter(self, phase: str) -> float:
        with self._lock:
            self._place = Place(self._place.count + 1, phase, self.step)
            if phase != "setup":
                training_began.set()
            self._since = time.monotonic()
            return self._since

    def place(self) -> tuple[Place, float]:
        """Where this rank is, and for how many seconds it has been there."""
        with self._lock:
            return self._place, time.monotonic() - self._since


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
class Throughput:
    """Turns a phase clock into images a second, percentages and the time left."""

    clock: PhaseClock
    global_batch: int
    flops_per_image: float
    """Forward and backward of one image."""
    peak_flops: float
    """Of all devices together; 0 where it is not known."""
    marked_at: float = 0.0
    marked_steps: int = 0
    marked_phases: dict[str, float] = field(default_factory=dict)

    def mark(self, now: float, step: int) -> None:
        """Begin a new interval."""
        self.marked_at, self.marked_steps = now, step
        self.marked_phases = dict(self.clock.seconds)

    def measure(self, now: float, step: int, total: int) -> dict[str, float]:
        """Rates since the last mark; begins a new interval."""
        values = self.rates(now, step, total)
        self.mark(now, step)
        return values

    def rates(self, now: float, step: int, total: int) -> dict[str, float]:
        """Rates since the last mark, evaluation and saving left out.

        ``phase_percent/NAME`` is the share of the whole interval that this rank's host spent in a
        phase; where it waits for a GPU, that is in "reduce".
        """
        spent = {
            phase: self.clock.seconds[phase] - self.marked_phases.get(phase, 0.0)
            for phase in PHASES
        }
        aside = spent["evaluate"] + spent["save"]
        wall = max(now - self.marked_at, 1e-9)
        training = max(wall - aside, 1e-9)
        steps = max(step - self.marked_steps, 1)
        rate = steps * self.global_batch / training
        values = {
            "images_per_second": rate,
            "data_wait_percent": 100 * spent["data"] / training,
            "seconds_left": (total - step) * wall / steps,
            **{f"phase_percent/{p}": 100 * s / wall for p, s in spent.items() if s},
        }
        if self.peak_flops:
            values["mfu_percent"] = 100 * rate * self.flops_per_image / self.peak_flops
        return values
