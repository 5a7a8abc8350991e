"""Types for the values of a configuration: numbers in a range, durations, names."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Protocol

from l2vit.errors import ConfigError


class Rule(Protocol):
    """What a value must satisfy besides its type, as ``Annotated[type, rule]``."""

    def problem(self, value: object) -> str:
        """What is wrong with ``value``, to follow the key and the value; empty if it is fine."""

    def __str__(self) -> str:
        """The rule in a few words, for the reference of keys."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number; NaN and infinities are refused everywhere."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def problem(self, value: object) -> str:
        assert isinstance(value, int | float)
        inside = self.at_least <= value <= self.at_most and self.above < value < self.below
        return "" if inside else f"must be {self}"

    def __str__(self) -> str:
        low, high = max(self.at_least, self.above), min(self.at_most, self.below)
        if high == math.inf:
            if self.above == -math.inf:
                return f"at least {low:g}"
            return "positive" if low == 0 else f"above {low:g}"
        opening = "(" if self.above >= low else "["
        closing = ")" if self.below <= high else "]"
        return f"in {opening}{low:g}, {high:g}{closing}"


@dataclass(frozen=True)
class NotEmpty:
    """Text that must be there."""

    def problem(self, value: object) -> str:
        return "" if str(value).strip() else "must not be empty"

    def __str__(self) -> str:
        return "not empty"


_DURATION = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([a-z]+?)s?\s*")
_UNITS = ("steps", "epochs", "images")


@dataclass(frozen=True)
class Duration:
    """A number and a unit, such as ``90 epochs``."""

    value: float
    unit: str
    """One of steps, epochs, images."""

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read ``90 epochs``, ``310800 steps`` or ``1e6 images`` (singular forms too).

        Raises:
            ConfigError: says what a duration looks like.
        """
        match = _DURATION.fullmatch(text)
        value = float(match[1]) if match else math.nan
        if match is None or f"{match[2]}s" not in _UNITS or not 0 <= value < math.inf:
            raise ConfigError(
                f"{text!r} is not a duration such as '90 epochs', '1000 steps' or '1e6 images'"
            )
        return cls(value, f"{match[2]}s")

    def steps(self, steps_per_epoch: int, global_batch: int) -> int:
        """Whole optimizer steps in this duration, rounded down."""
        factor = {"steps": 1.0, "epochs": float(steps_per_epoch), "images": 1 / global_batch}
        # 0.1 epochs of 310 steps is 31.000000000000004 or 30.999999999999996: neither is meant.
        return math.floor(self.value * factor[self.unit] + 1e-6)


@dataclass(frozen=True)
class IsDuration:
    """Text that reads as a `Duration`; or, where ``may_be_empty``, as never."""

    may_be_empty: bool = False

    def problem(self, value: object) -> str:
        if self.may_be_empty and value == "":
            return ""
        try:
            Duration.parse(str(value))
        except ConfigError:
            return "is not a duration such as '90 epochs', '1000 steps' or '1e6 images'"
        return ""

    def __str__(self) -> str:
        return "a duration or empty" if self.may_be_empty else "a duration"


Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
"""A probability or a part of a whole."""
ShareBelow1 = Annotated[float, Range(at_least=0, below=1)]
PositiveShare = Annotated[float, Range(above=0, at_most=1)]
Count = Annotated[int, Range(at_least=1)]
CountOrZero = Annotated[int, Range(at_least=0)]
Text = Annotated[str, NotEmpty()]
DurationText = Annotated[str, IsDuration()]
DurationOrEmpty = Annotated[str, IsDuration(may_be_empty=True)]
