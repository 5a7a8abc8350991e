"""Random choices for one picture: a pure function of (purpose, seed, epoch, picture)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from l2vit.data.rng import derive_key, uniforms

T = TypeVar("T")
_AT_FIRST = 64


class Draws:
    """Uniform numbers in the order they are asked for; the same arguments give the same ones."""

    def __init__(self, purpose: str, seed: int, epoch: int, picture: int) -> None:
        self._key = derive_key(purpose, seed, epoch)
        self._stream = np.array([picture])
        self._numbers = uniforms(self._key, self._stream, _AT_FIRST)[0]
        self._next = 0

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        if self._next == len(self._numbers):
            self._numbers = uniforms(self._key, self._stream, 2 * len(self._numbers))[0]
        value = self._numbers[self._next]
        self._next += 1
        return float(low + (high - low) * value)

    def whole(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self.between(0, high - low + 1))

    def happens(self, probability: float) -> bool:
        """True with the given probability."""
        return self.between(0, 1) < probability

    def one_of(self, options: Sequence[T]) -> T:
        """One of ``options``, all equally likely."""
        return options[self.whole(0, len(options) - 1)]
