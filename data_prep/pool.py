"""Work spread over processes, with progress lines."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from l2vit.errors import UserError

_INTERVAL = 5.0
_context: Any = None
_function: Callable[[Any, Any], Any] | None = None


def _start_worker(function: Callable[[Any, Any], Any], context: Any, parent: int) -> None:
    global _function, _context
    _function, _context = function, context
    # A worker that outlived a killed parent would go on writing under the next run's feet.
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(task: Any) -> Any:
    assert _function is not None
    return _function(_context, task)


def each(
    function: Callable[[Any, Any], Any], context: Any, tasks: Sequence[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    """Yield ``(task, function(context, task))`` as tasks finish, in any order.

    The first error of any task is raised here, after the running ones ended.

    Raises:
        UserError: a worker was killed (out of memory).
    """
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield task, function(context, task)
        return
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)),
        mp_context=fork,
        initializer=_start_worker,
        initargs=(function, context, os.getpid()),
    )
    try:
        waiting = iter(tasks)
        running = {}
        for task in waiting:
            running[pool.submit(_call, task)] = task
            if len(running) < 2 * workers:
                continue
            yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, most likely for want of memory: give fewer --workers and run the"
            " same command again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(running: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


class Progress:
    """One line every few seconds: what, how far, how fast, how long still."""

    def __init__(self, what: str, total: int, unit: str = "images") -> None:
        self._what, self._total, self._unit = what, max(total, 1), unit
        self._done = self._count = 0
        self._start = self._last = time.monotonic()

    def add(self, done: int, count: int) -> None:
        """``done`` of the total (which sets the ETA) and ``count`` images (which set the rate)."""
        self._done += done
        self._count += count
        if time.monotonic() - self._last >= _INTERVAL:
            self._last = time.monotonic()
            self._print(final=False)

    def finish(self) -> None:
        """Print the closing line."""
        self._print(final=True)

    def _print(self, *, final: bool) -> None:
        seconds = max(time.monotonic() - self._start, 1e-6)
        share = min(1.0, self._done / self._total)
        rest = seconds / share - seconds if share else 0.0
        when = f"took {clock(seconds)}" if final else f"ETA {clock(rest)}"
        print(
            f"{self._what}: {100 * (1.0 if final else share):3.0f}%  {self._count:,} {self._unit}"
            f"  {self._count / seconds:,.0f}/s  {when}",
            file=sys.stdout,
            flush=True,
        )


def clock(seconds: float) -> str:
    """``h:mm:ss``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
