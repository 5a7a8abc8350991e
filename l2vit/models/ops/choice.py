"""Which form of an operation a run has settled on.

A *form* is one way to compute an operation: the reference, a kernel, the compiler's. Without a
table fixed rules choose (``ops/__init__.py``). A run that has timed the forms on its device sets
its table here; shapes that are not in it then take the reference, so that all ranks compute alike
and a continued run computes the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

REFERENCE = "reference"
Options = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One operation on inputs of one shape and type."""

    op: str
    shape: tuple[int, ...]
    """Of the first input."""
    dtype: str
    options: Options
    """The sizes that the first input does not show, see the operation."""

    @property
    def key(self) -> str:
        """What tables call it: ``window_attention 128x56x56x288 heads 3, 7 bfloat16``."""
        sizes = "x".join(map(str, self.shape))
        return f"{self.op} {sizes} {','.join(map(str, self.options))} {self.dtype}"


_table: Mapping[str, str] | None = None
_recorded: dict[str, Call] | None = None


def use_table(table: Mapping[str, str] | None) -> None:
    """From now on operations take the forms of ``table`` (`Call.key` to form); None: the rules."""
    global _table
    _table = table


@contextlib.contextmanager
def recorded_calls() -> Iterator[dict[str, Call]]:
    """Inside, operations take the reference, and what was called is recorded by its key."""
    global _recorded
    before, _recorded = _recorded, {}
    try:
        yield _recorded
    finally:
        _recorded = before


def settled(op: str, x: Tensor, options: Options) -> str | None:
    """The form of the table for this call; None where there is no table."""
    if _table is None and _recorded is None:
        return None
    return _look_up(op, tuple(int(size) for size in x.shape), str(x.dtype), options)


@torch.compiler.assume_constant_result
def _look_up(op: str, shape: tuple[int, ...], dtype: str, options: Options) -> str:
    """Compilers run this for real while they trace, and keep the answer."""
    call = Call(op, shape, dtype.removeprefix("torch."), options)
    if _recorded is not None:
        _recorded[call.key] = call
        return REFERENCE
    return (_table or {}).get(call.key, REFERENCE)
