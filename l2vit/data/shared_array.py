"""Large read-only arrays that worker processes map instead of receiving a copy each."""

from __future__ import annotations

import mmap
import os
from multiprocessing import context, reduction
from typing import Any

import numpy as np

_SMALL = 4096
"""Bytes up to which an array is sent like anything else."""


class SharedArray:
    """A read-only array. A process started from this one is sent a descriptor of its memory.

    The memory has no name that could stay behind and does not count as ``/dev/shm``. Pickled for
    anything but the start of a process, the array is copied.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self._descriptor = -1

    def __reduce__(self) -> tuple[object, ...]:
        if self.values.nbytes <= _SMALL or context.get_spawning_popen() is None:
            return SharedArray, (self.values,)
        if self._descriptor < 0:
            self._move()
        descriptor = reduction.DupFd(self._descriptor)
        return _received, (descriptor, self.values.dtype.str, self.values.shape)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _move(self) -> None:
        """Put the values where other processes can map them, and keep no second copy here."""
        self._descriptor = os.memfd_create("array")
        with open(self._descriptor, "wb", closefd=False) as stream:
            stream.write(np.ascontiguousarray(self.values).data)
        self.values = _mapped(self._descriptor, self.values.dtype.str, self.values.shape)


def _mapped(descriptor: int, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    return np.frombuffer(memory, kind).reshape(shape)


def _received(descriptor: Any, kind: str, shape: tuple[int, ...]) -> SharedArray:
    number = descriptor.detach()
    try:
        return SharedArray(_mapped(number, kind, shape))
    finally:
        os.close(number)
