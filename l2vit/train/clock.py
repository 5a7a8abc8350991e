"""What this rank is doing, since when, and how its time was spent."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

PHASES = ("setup", "data", "mix", "forward", "backward", "reduce", "save", "evaluate", "log")


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
        self._since = time.monotonic()
        self.step = 0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Be in ``phase`` (one of ``PHASES``) within."""
        began = self._enter(phase)
        try:
            yield
        finally:
            self.seconds[phase] += time.monotonic() - began

    def beat(self) -> None:
        """Tell of progress within the phase: one that takes long, as an evaluation may, is no hang.

        Ranks beat equally often, too.
        """
        self._enter(self._place.phase)

    def _enter(self, phase: str) -> float:
        with self._lock:
            self._place = Place(self._place.count + 1, phase, self.step)
            self._since = time.monotonic()
            return self._since

    def place(self) -> tuple[Place, float]:
        """Where this rank is, and for how many seconds it has been there."""
        with self._lock:
            return self._place, time.monotonic() - self._since
