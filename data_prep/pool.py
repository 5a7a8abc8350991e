"""Run a function over many tasks in worker processes, and print progress."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from l2vit.errors import UserError

_INTERVAL = 5.0
_PR_SET_PDEATHSIG = 1


def parallel_map(
    function: Callable[[Any, Any], Any], context: Any, tasks: Sequence[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    """Yield ``(task, function(context, task))`` as tasks finish, in any order.

    The first error is raised here, after the running tasks have ended.

    Raises:
        UserError: a worker was killed (out of memory).
    """
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield task, function(context, task)
        return
    waiting = iter(tasks)
    running: list[_Worker] = []
    try:
        for task in _some(waiting, workers):
            running.append(_Worker(function, context))
            running[-1].give(task)
        while busy := {worker.pipe: worker for worker in running if worker.task}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                finished = worker.take()
                for task in _some(waiting, 1):
                    worker.give(task)
                yield finished
    finally:
        for worker in running:
            worker.end()


def _some(tasks: Iterator[Any], count: int) -> Iterator[Any]:
    return (task for _, task in zip(range(count), tasks, strict=False))


class _Worker:
    """A forked process with a pipe of its own.

    Workers share nothing: a shared queue, as in ``ProcessPoolExecutor``, hangs for ever when a
    worker is killed while it holds the queue's lock or has written half of a result.
    """

    def __init__(self, function: Callable[[Any, Any], Any], context: Any) -> None:
        fork = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe()
        self.task: tuple[Any, ...] = ()
        """The task it is working on, in a tuple; empty when idle."""
        arguments = (theirs, function, context, os.getpid())
        self._process = fork.Process(target=_serve, args=arguments)
        # The child must not collect this process's garbage: a destructor may wait for threads
        # that a fork does not copy (a DALI pipeline's does).
        gc.disable()
        self._process.start()
        gc.enable()
        theirs.close()  # so that its death ends the pipe

    def give(self, task: Any) -> None:
        self.task = (task,)
        with _raise_if_killed():
            self.pipe.send(self.task)

    def take(self) -> tuple[Any, Any]:
        """The task and its result; raises its error."""
        with _raise_if_killed():
            result, error = self.pipe.recv()
        (task,), self.task = self.task, ()
        if error is not None:
            raise error
        return task, result

    def end(self) -> None:
        """Wait for its task and stop it."""
        with contextlib.suppress(Exception):  # the error that ends the work was raised before
            if self.task:
                self.pipe.recv()
            self.pipe.send(())
        self._process.join()
        self.pipe.close()


@contextlib.contextmanager
def _raise_if_killed() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise UserError(
            "a worker was killed, most likely for want of memory: give fewer --workers and run the"
            " same command again"
        ) from None


def _serve(pipe: Connection, function: Callable[[Any, Any], Any], context: Any, run: int) -> None:
    """Worker process: run tasks until an empty tuple arrives."""
    gc.freeze()
    gc.enable()
    # Die with the parent: a worker that lived on would write while the next run writes.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != run:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while task := pipe.recv():
        try:
            answer: tuple[Any, Exception | None] = (function(context, *task), None)
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note("".join(traceback.format_exception(error)))
            answer = (None, error)
        pipe.send(answer)


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
