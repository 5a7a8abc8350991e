"""The host backend: PIL in worker processes, carrying out the same work as the DALI backend."""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from l2vit.data import host_ops
from l2vit.data.bad_samples import Fetched, fetch
from l2vit.data.config import AugmentConfig
from l2vit.data.draws import Drawer, fill_colour
from l2vit.data.pixel_ops import apply_ops
from l2vit.data.plan import EvalPlan, TrainPlan, Work
from l2vit.data.raw import Erasing, RawBatch
from l2vit.data.shards import ShardReader
from l2vit.errors import UserError

_SPARED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
"""What a user or a scheduler may send to all processes of a run so that it saves and stops."""
_DYING = 5.0
"""Seconds in which a worker whose batch was cut off turns out to be dead."""


def _decoded(
    reader: ShardReader, ids: np.ndarray, following: Callable[[int], int], limit: int
) -> Fetched[np.ndarray]:
    return fetch(
        reader,
        ids,
        lambda sample: host_ops.decode(sample.image),
        following=following,
        limit=limit,
    )


@dataclass
class HostTrainSet(torch.utils.data.Dataset[RawBatch]):
    """Training micro-batches by number; what a worker process runs."""

    reader: ShardReader
    plan: TrainPlan
    augment: AugmentConfig
    drawer: Drawer
    input_size: int
    limit: int

    def __getitem__(self, number: int) -> RawBatch:
        work = self.plan.work(number)
        fetched = _decoded(self.reader, work.ids, self.plan.order.following, self.limit)
        return carry_out(work, fetched, work.ids, self.drawer, self.augment, self.input_size)


def carry_out(
    work: Work,
    fetched: Fetched[np.ndarray],
    drawn_for: np.ndarray,
    drawer: Drawer,
    augment: AugmentConfig,
    input_size: int,
) -> RawBatch:
    """Crop, resize, flip and change decoded pictures as drawn for the samples ``drawn_for``."""
    pictures = fetched.payloads
    drawn = drawer.draw(work.epoch, drawn_for[: len(pictures)])
    sizes = np.array([picture.shape[:2] for picture in pictures]).reshape(-1, 2)
    boxes = drawer.boxes(drawn, sizes)
    pixels = np.empty((len(pictures), input_size, input_size, 3), np.uint8)
    for i, picture in enumerate(pictures):
        picture = host_ops.crop_resize(picture, boxes[i], input_size, augment.interpolation)
        pixels[i] = picture[:, ::-1] if drawn.flip[i] else picture
    batch = apply_ops(
        torch.from_numpy(pixels),
        drawn.ops,
        drawn.arguments,
        fill=fill_colour(augment),
        interpolation=augment.interpolation,
    )
    return RawBatch(
        work,
        batch,
        fetched.ids,
        fetched.labels,
        Erasing.draw(drawn.erase, drawn.noise_keys),
        fetched.bad,
        fetched.complete,
    )


class HostEvalSet(torch.utils.data.Dataset[RawBatch]):
    """Evaluation batches by number, through timm's own evaluation transform."""

    def __init__(
        self,
        reader: ShardReader,
        plan: EvalPlan,
        *,
        input_size: int,
        crop_fraction: float,
        crop_mode: str,
    ) -> None:
        self._reader, self._plan, self._size = reader, plan, input_size
        self._transform = transforms_imagenet_eval(
            input_size,
            crop_pct=crop_fraction,
            crop_mode=crop_mode,
            interpolation="bicubic",
            use_prefetcher=True,  # bytes; normalised with the batch
        )

    def __getitem__(self, number: int) -> RawBatch:
        work = self._plan.work(number)
        fetched = _decoded(self._reader, work.ids, lambda sample_id: sample_id, limit=0)
        pixels = torch.empty((len(fetched.ids), self._size, self._size, 3), dtype=torch.uint8)
        for place, picture in enumerate(fetched.payloads):
            pixels[place] = self._transform(Image.fromarray(picture)).permute(1, 2, 0)
        return RawBatch(
            work, pixels, fetched.ids, fetched.labels, None, fetched.bad, fetched.complete
        )


def host_batches(
    dataset: torch.utils.data.Dataset[RawBatch],
    *,
    workers: int,
    prefetch: int,
    pin: bool,
    count: int | None = None,
) -> Generator[RawBatch, None, None]:
    """Batches 0, 1, … of ``dataset`` in order, made ahead by ``workers`` processes.

    Args:
        dataset: makes a batch from its number.
        workers: worker processes; 0 works in this one, when asked.
        prefetch: batches ready ahead in each worker.
        pin: put them in page-locked memory (for a GPU).
        count: how many; None for without end.
    """
    numbers: Iterable[int] | None = itertools.count() if count is None else range(count)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        numbers = None  # it counts by itself
    else:
        dataset = _Telling(dataset)
    lifeline, end = multiprocessing.Pipe(duplex=False)
    loader = torch.utils.data.DataLoader(
        dataset,
        multiprocessing_context=_server() if workers else None,
        worker_init_fn=functools.partial(_begin, lifeline),
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_unchanged,
        pin_memory=pin,
    )
    atexit.register(end.close)  # before multiprocessing waits for the workers
    return _told(iter(loader), end)


@dataclass
class _Telling(torch.utils.data.Dataset[Any]):
    """Gives a user's error back instead of raising it: torch would bury it in a traceback."""

    inner: torch.utils.data.Dataset[RawBatch]

    def __getitem__(self, number: int) -> RawBatch | UserError:
        try:
            return self.inner[number]
        except UserError as error:
            return error


def _told(
    items: Iterator[RawBatch | UserError], end: Connection
) -> Generator[RawBatch, None, None]:
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
    return bool(wait(ends, timeout=_DYING))


def _server() -> multiprocessing.context.ForkServerContext:
    """Where workers are forked from: a process that has imported what they need, once.

    Not from this one: it has threads (DALI, gloo, NCCL) whose locks a fork would copy held. The
    server and its workers begin with the signals of ``_SPARED`` blocked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SPARED)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _begin(lifeline: Connection, worker: int) -> None:
    """In a worker: outlive the signals that ask a run to save, but not the run.

    Slurm and terminals signal every process of a job, and the step under way may still need
    batches. torch ends a worker that does not answer by SIGTERM: the second one is obeyed.

    torch's workers watch their parent, which here is the server; the server waits for the
    workers. After a SIGKILL of the run both would stay for ever. So a worker ends when the other
    end of ``lifeline``, which the run alone holds, has closed.
    """
    for number in _SPARED - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SPARED)

    def watch() -> None:
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=watch, name="watch", daemon=True).start()


def _unchanged(raw: Any) -> Any:
    return raw
