"""Worker processes that make batches ahead, and what happens when one is killed."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import itertools
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch

from l2vit.errors import UserError

T = TypeVar("T")
_SAVE_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
"""What a user or a scheduler may send to all processes of a run so that it saves and stops."""
_DEATH_SECONDS = 5.0
"""Seconds in which a worker whose batch was cut off turns out to be dead."""
_PIPE_BYTES = 2**20
"""Bytes; the most Linux grants by default."""


class WorkerBatches(Generic[T]):
    """Batches 0, 1, … of ``dataset`` in order, made ahead by processes that last an iteration.

    Args:
        dataset: makes a batch from its number.
        workers: worker processes; 0 works in this one, when asked.
        prefetch: batches ready ahead in each worker.
        pin: put them in page-locked memory (for a GPU).
        count: how many; None for without end.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset[T],
        *,
        workers: int,
        prefetch: int,
        pin: bool,
        count: int | None = None,
    ) -> None:
        self._numbers: Iterable[int] | None
        self._numbers = itertools.count() if count is None else range(count)
        self._dataset: torch.utils.data.Dataset[Any] = _ReturnedErrors(dataset)
        if isinstance(dataset, torch.utils.data.IterableDataset):
            self._numbers, self._dataset = None, dataset  # it counts by itself
        self._workers, self._prefetch, self._pin = workers, prefetch, pin

    def __iter__(self) -> Generator[T, None, None]:
        lifeline, end = multiprocessing.Pipe(duplex=False)
        loader = torch.utils.data.DataLoader(
            self._dataset,
            multiprocessing_context=_forkserver() if self._workers else None,
            worker_init_fn=functools.partial(_init_worker, lifeline),
            sampler=self._numbers,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            collate_fn=_unchanged,
            pin_memory=self._pin,
        )
        atexit.register(end.close)  # before multiprocessing waits for the workers
        items = iter(loader)
        _enlarge_pipe(items)
        return _raising_errors(items, end)

    def close(self) -> None:
        """Nothing lives longer than an iteration."""


@dataclass
class _ReturnedErrors(torch.utils.data.Dataset[Any]):
    """Gives a user's error back instead of raising it: torch would bury it in a traceback."""

    inner: torch.utils.data.Dataset[Any]

    def __getitem__(self, number: int) -> Any:
        try:
            return self.inner[number]
        except UserError as error:
            return error


def _raising_errors(items: Iterator[T | UserError], end: Connection) -> Generator[T, None, None]:
    """``items``, until a user's error; closes ``end`` of the workers' lifeline afterwards."""
    try:
        for item in items:
            if isinstance(item, UserError):
                raise item
            yield item
    except UserError:
        raise
    except Exception as error:
        if not _is_of_lost_worker(error, items):
            raise
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"a process that loads pictures was killed ({what}); if the machine ran out of memory,"
            " lower data.threads or data.prefetch"
        ) from error
    finally:
        del items  # ends the workers orderly, unless a traceback still holds it
        end.close()
        atexit.unregister(end.close)


def _is_of_lost_worker(error: Exception, items: Iterator[Any]) -> bool:
    """Whether a worker died: torch says so, or a batch on its way was cut off with it."""
    if str(error).startswith("Caught "):  # raised in a worker that lives
        return False
    if "DataLoader worker" in str(error):
        return True
    ends = [worker.sentinel for worker in getattr(items, "_workers", ())]
    return bool(wait(ends, timeout=_DEATH_SECONDS))


class _Flag:
    """An event without a lock.

    torch asks its event after every batch. A worker killed at that moment would keep the lock of
    ``multiprocessing.Event``, and the run would wait for it for ever.
    """

    def __init__(self) -> None:
        self._end, self._other = multiprocessing.Pipe(duplex=False)

    def __getstate__(self) -> Connection:
        return self._end  # workers only ask

    def __setstate__(self, end: Connection) -> None:
        self._end = end

    def set(self) -> None:
        self._other.send_bytes(b"set")

    def is_set(self) -> bool:
        return self._end.poll()


class _Context(multiprocessing.context.ForkServerContext):
    """How torch makes its processes, such that the death of one stops no other."""

    def Event(self) -> Any:
        return _Flag()


def _enlarge_pipe(items: Iterator[Any]) -> None:
    """Make the pipe of finished batches hold all made ahead (64 KiB do not, at 7 KiB a batch).

    A worker killed with a message half written would leave its reader waiting for the rest. Only
    this pipe: beyond 64 MiB of them, Linux gives a user without privileges 8 KiB for each new one.
    """
    finished = getattr(items, "_worker_result_queue", None)
    with contextlib.suppress(OSError, AttributeError):  # no workers; no more allowed; not Linux
        fcntl.fcntl(finished._writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[union-attr]


def _forkserver() -> multiprocessing.context.BaseContext:
    """Where workers are forked from: a process that has imported what they need, once.

    Not from this one: it has threads (DALI, gloo, NCCL) whose locks a fork would copy held. The
    server and its workers begin with the signals of ``_SAVE_SIGNALS`` blocked.
    """
    context = _Context()
    context.set_forkserver_preload(["l2vit.data.pil"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SAVE_SIGNALS)
    try:
        resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM when it has started
        signal.pthread_sigmask(signal.SIG_BLOCK, _SAVE_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _init_worker(lifeline: Connection, worker: int) -> None:
    """In a worker: outlive the signals that ask a run to save, but not the run.

    Slurm and terminals signal every process of a job, and the step under way may still need
    batches. torch ends a worker that does not answer by SIGTERM: the second one is obeyed.

    torch's workers watch their parent, which here is the server; the server waits for the
    workers. After a SIGKILL of the run both would stay for ever. So a worker ends when the other
    end of ``lifeline``, which the run alone holds, has closed.
    """
    for number in _SAVE_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SAVE_SIGNALS)

    def watch() -> None:
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=watch, name="watch", daemon=True).start()


def _unchanged(raw: Any) -> Any:
    return raw
