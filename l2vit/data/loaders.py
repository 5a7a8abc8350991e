"""The loaders a run uses: batches of one exact global order, made by either backend."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import torch

from l2vit import config
from l2vit.data.bad_samples import BadSampleLog, NoBadSamples
from l2vit.data.batch import Batch
from l2vit.data.config import AugmentConfig, DataConfig, EvalConfig, EvalSetConfig
from l2vit.data.dali_loader import DaliBatches
from l2vit.data.draws import Drawer, fill_colour
from l2vit.data.feeds import EvalFeeds, TrainFeeds
from l2vit.data.host_loader import HostEvalSet, HostTrainSet
from l2vit.data.manifest import Manifest
from l2vit.data.order import SampleOrder, Share, Split
from l2vit.data.pixel_ops import apply_ops
from l2vit.data.plan import EvalPlan, TrainPlan
from l2vit.data.raw import Finisher, RawBatch
from l2vit.data.shards import ShardReader
from l2vit.data.subset import subset_ids
from l2vit.data.workers import host_batches
from l2vit.errors import ConfigError

_PATIENCE = 60.0
"""Seconds to wait for the batch being made when a loader is closed: a pipe may hang for ever."""


def train_loader(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    manifest: Manifest,
    split: Split,
    rank: int,
    seed: int,
    device: torch.device,
    images_seen: int = 0,
    bad_samples_log: Path | None = None,
) -> TrainLoader:
    """Training micro-batches of one rank, from ``images_seen`` on, without end.

    Args:
        data: where and with what to read.
        augment: what is done to each picture (mixing is ``mixing.Mixer``'s).
        manifest: of ``data.train``.
        split: how ranks and micro-batches share the global batch.
        rank: this rank.
        seed: of the order and of the augmentation.
        device: where batches go.
        images_seen: images consumed since the run began; a multiple of the global batch.
        bad_samples_log: file for unusable samples, shared by the ranks.

    Raises:
        ConfigError: there is less data than one global batch.
        UserError: no step begins at ``images_seen``, or the subset's labels cannot be read; while
            iterating, too many unusable samples or a worker process that was killed.
    """
    directory = Path(data.train)
    subset = subset_ids(data.subset, directory, manifest, seed=seed)
    order = SampleOrder(
        manifest.hash,
        [shard.samples for shard in manifest.shards],
        seed=seed,
        chunk=data.chunk,
        global_batch=split.global_batch,
        subset=subset,
    )
    plan = TrainPlan(order, Share(rank, split), images_seen)
    plan.work(0)  # refuse an impossible images_seen here, not in a worker
    drawer = Drawer(augment, input_size=data.input_size, seed=seed)
    reader = ShardReader(directory, manifest)
    log = BadSampleLog(bad_samples_log, rank=rank, limit=data.max_bad_samples, directory=directory)
    if data.backend == "host":
        dataset: torch.utils.data.Dataset[RawBatch]
        if data.stream:
            dataset = _stream_set(data, augment, manifest, plan, drawer, seed)
        else:
            dataset = HostTrainSet(reader, plan, augment, drawer, data.input_size, log.limit)
        raw = host_batches(
            dataset,
            workers=data.threads,
            prefetch=data.prefetch,
            pin=device.type == "cuda",
        )
    else:
        feeds = TrainFeeds(reader, plan, drawer, data.input_size, log.limit, log, data.prefetch)
        batches = _dali(
            feeds, data, device, interpolation=augment.interpolation, batch=split.micro_batch
        )
        raw = _augmented(batches, augment)
    finish = Finisher(mean=augment.mean, std=augment.std, device=device)
    return TrainLoader(raw, finish, log, order=order, device=device)


def _stream_set(
    data: DataConfig,
    augment: AugmentConfig,
    manifest: Manifest,
    plan: TrainPlan,
    drawer: Drawer,
    seed: int,
) -> torch.utils.data.Dataset[RawBatch]:
    from l2vit.data.stream import StreamTrainSet

    readers = plan.share.split.world * max(1, data.threads)
    if readers > len(manifest.shards):
        raise ConfigError(
            f"data.stream: {len(manifest.shards)} shards are too few for {readers} readers"
            f" ({plan.share.split.world} ranks × {max(1, data.threads)} workers)"
        )
    return StreamTrainSet(
        url=data.stream,
        directory=Path(data.train),
        manifest=manifest,
        plan=plan,
        augment=augment,
        drawer=drawer,
        input_size=data.input_size,
        seed=seed,
        buffer=data.stream_buffer,
        limit=data.max_bad_samples,
    )


def _dali(
    feeds: TrainFeeds | EvalFeeds,
    data: DataConfig,
    device: torch.device,
    *,
    interpolation: str,
    batch: int,
    count: int | None = None,
) -> DaliBatches:
    index = None
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
    return DaliBatches(
        feeds,
        count=count,
        prefetch=data.prefetch,
        batch=batch,
        input_size=data.input_size,
        interpolation=interpolation,
        threads=max(1, data.threads),
        gpu=index is not None,
        device_id=index,
        hw_decoder_load=data.hw_decoder_load,
    )


def _augmented(batches: DaliBatches, augment: AugmentConfig) -> Generator[RawBatch, None, None]:
    fill = fill_colour(augment)
    for feed, pixels in batches:
        extra = feed.extra
        pixels = apply_ops(
            pixels,
            extra.drawn.ops,
            extra.drawn.arguments,
            fill=fill,
            interpolation=augment.interpolation,
        )
        yield RawBatch(feed.work, pixels, feed.ids, feed.labels, extra.erasing)


class TrainLoader:
    """Endless iterator over one rank's micro-batches, in order."""

    def __init__(
        self,
        raw: Generator[RawBatch, None, None],
        finish: Finisher,
        log: BadSampleLog,
        *,
        order: SampleOrder,
        device: torch.device,
    ) -> None:
        self.order = order
        self._log = log
        self._batches = _Ahead(self._finished(raw, finish), device)

    def _finished(self, raw: Generator[RawBatch, None, None], finish: Finisher) -> Iterator[Batch]:
        with contextlib.closing(raw):  # an error's traceback would keep its processes alive
            for batch in raw:
                self._log.record(batch.bad, complete=batch.complete)
                yield finish(batch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """End the threads and processes that work ahead."""
        self._batches.close()


def eval_loader(
    dataset: EvalSetConfig,
    data: DataConfig,
    evaluation: EvalConfig,
    augment: AugmentConfig,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> EvalLoader:
    """Every image of a shard directory once over all ranks, as timm evaluates (bicubic).

    Args:
        dataset: which shards, and a size and a crop of their own.
        data: backend, threads and the usual input size.
        evaluation: batch and the usual crop.
        augment: mean and standard deviation.
        device: where batches go.
        rank: this rank.
        world: number of ranks.

    Raises:
        UserError: no finished shard directory, or (while iterating) an image that cannot be used:
            an evaluation is exact or fails.
    """
    config.check(dataset)
    config.check(evaluation)
    directory = Path(dataset.data)
    input_size = dataset.input_size or data.input_size
    crop_fraction = dataset.crop_fraction or evaluation.crop_fraction
    manifest = Manifest.load(directory)
    plan = EvalPlan(manifest.samples, rank, world, evaluation.batch)
    reader = ShardReader(directory, manifest)
    log = NoBadSamples(directory)
    finish = Finisher(mean=augment.mean, std=augment.std, device=device)
    makers: _HostEval | _DaliEval
    if data.backend == "host":
        pictures = HostEvalSet(
            reader,
            plan,
            input_size=input_size,
            crop_fraction=crop_fraction,
            crop_mode=evaluation.crop_mode,
        )
        pin = device.type == "cuda"
        makers = _HostEval(pictures, data.threads, data.prefetch, pin, plan.filled)
    else:
        feeds = EvalFeeds(reader, plan, input_size, crop_fraction, evaluation.crop_mode, log)
        settings = dataclasses.replace(data, input_size=input_size)
        makers = _DaliEval(
            _dali(
                feeds,
                settings,
                device,
                interpolation="bicubic",
                batch=evaluation.batch,
                count=plan.filled,
            )
        )
    return EvalLoader(manifest, plan, makers, finish, log, input_size)


class _HostEval:
    """Raw evaluation batches from worker processes, which live as long as one iteration."""

    def __init__(
        self, dataset: HostEvalSet, workers: int, prefetch: int, pin: bool, count: int
    ) -> None:
        self._dataset, self._count = dataset, count
        self._workers, self._prefetch, self._pin = workers, prefetch, pin

    def __iter__(self) -> Iterator[RawBatch]:
        return host_batches(
            self._dataset,
            workers=min(self._workers, self._count),
            prefetch=self._prefetch,
            pin=self._pin,
            count=self._count,
        )

    def close(self) -> None:
        pass


class _DaliEval:
    def __init__(self, batches: DaliBatches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[RawBatch]:
        for feed, pixels in self._batches:
            yield RawBatch(feed.work, pixels, feed.ids, feed.labels)

    def close(self) -> None:
        self._batches.close()


class EvalLoader:
    """Re-iterable over one rank's evaluation batches; as many on every rank."""

    def __init__(
        self,
        manifest: Manifest,
        plan: EvalPlan,
        raw: _HostEval | _DaliEval,
        finish: Finisher,
        log: NoBadSamples,
        input_size: int,
    ) -> None:
        self.manifest = manifest
        self._plan, self._raw, self._finish, self._log = plan, raw, finish, log
        self._size = input_size

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        if self._plan.filled:
            for batch in self._raw:
                self._log.record(batch.bad, complete=batch.complete)
                yield self._finish(batch)
        for number in range(self._plan.filled, len(self._plan)):
            yield self._finish(self._empty(number))

    def _empty(self, number: int) -> RawBatch:
        pixels = torch.empty((0, self._size, self._size, 3), dtype=torch.uint8)
        nothing = np.zeros(0, np.int64)
        return RawBatch(self._plan.work(number), pixels, nothing, nothing)

    def close(self) -> None:
        """End what works ahead."""
        self._raw.close()


class _Ahead:
    """Runs an iterator in a thread, one item ahead.

    On a GPU the thread works on a stream of its own, and an item is handed over with the event
    that says its kernels are done.
    """

    def __init__(self, items: Iterator[Batch], device: torch.device) -> None:
        self._items = items
        self._cuda = device if device.type == "cuda" else None
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._queue: queue.Queue[tuple[Batch | BaseException, torch.cuda.Event | None]]
        self._queue = queue.Queue(1)
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        # A thread that still computes when the interpreter goes down aborts the process.
        atexit.register(self.close)
        self._thread.start()

    def _work(self) -> None:
        try:
            stream = torch.cuda.Stream(self._cuda) if self._cuda else None
            with torch.cuda.stream(stream):
                while not self._stop.is_set():
                    item, done = next(self._items), None
                    if stream is not None:
                        done = torch.cuda.Event()
                        done.record(stream)
                    self._put((item, done))
        except BaseException as error:  # handed to the one who waits for the item
            self._put((error, None))

    def _put(self, entry: tuple[Batch | BaseException, torch.cuda.Event | None]) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.2)
                return
            except queue.Full:
                continue

    def __next__(self) -> Batch:
        if self._ended is not None:
            raise self._ended  # nothing more will come: waiting would never end
        item, done = self._queue.get()
        if isinstance(item, BaseException):
            self._ended = item
            raise item
        if done is not None:
            current = torch.cuda.current_stream(self._cuda)
            current.wait_event(done)
            # made on the other stream: its memory must not be reused before this one is done
            item.images.record_stream(current)
            item.labels.record_stream(current)
        return item

    def close(self) -> None:
        atexit.unregister(self.close)
        self._stop.set()
        self._ended = self._ended or RuntimeError("the loader is closed")
        self._thread.join(_PATIENCE)
        self._items = iter(())
