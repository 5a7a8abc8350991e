"""The loaders a run uses: batches of one exact global order, made by either backend."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import queue
import threading
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from l2vit import config
from l2vit.data import dali_probe, mixup
from l2vit.data.augment import AugmentSampler
from l2vit.data.bad_samples import BadSampleLog, NoBadSamples
from l2vit.data.batch import Batch, DecodedBatch, EvalPlanner, Normalizer, TrainPlanner
from l2vit.data.config import AugmentConfig, DataConfig, EvalConfig, EvalSetConfig
from l2vit.data.dali import DaliBatches, EvalSource, Source, TrainSource
from l2vit.data.manifest import Manifest
from l2vit.data.order import SampleOrder, Share, Split
from l2vit.data.pil import PilEvalSet, PilTrainSet
from l2vit.data.shard_cache import shard_cache, warn_of_small_cache
from l2vit.data.shards import ShardReader
from l2vit.data.subset import subset_ids
from l2vit.data.workers import WorkerBatches
from l2vit.errors import ConfigError

_CLOSING_SECONDS = 60.0
"""How long to wait for the batch being made when a loader is closed: a disk may hang for ever."""


class Batches(Protocol):
    """What a backend gives: batches in order, anew with each iteration."""

    def __iter__(self) -> Generator[DecodedBatch, None, None]: ...

    def close(self) -> None:
        """End what works ahead."""


def train_loader(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    manifest: Manifest,
    split: Split,
    rank: int,
    seed: int,
    device: torch.device,
    draws: int = 0,
    images_seen: int = 0,
    bad_samples_log: Path | None = None,
) -> TrainLoader:
    """Training micro-batches of one rank, from ``images_seen`` on, without end.

    Args:
        data: where and with what to read.
        augment: what is done to each picture (mixing is ``mixup.Mixer``'s).
        manifest: of ``data.train``.
        split: how ranks and micro-batches share the global batch.
        rank: this rank.
        seed: of the order and of the augmentation.
        device: where batches go.
        draws: version of the draws (``run.draws``), 0 for the newest.
        images_seen: images consumed since the run began; a multiple of the global batch.
        bad_samples_log: file for unusable samples, shared by the ranks.

    Raises:
        ConfigError: there is less data than one global batch.
        UserError: no step begins at ``images_seen``, or the subset's labels cannot be read; while
            iterating, too many unusable samples or a worker process that was killed.
    """
    where = data.train
    order = SampleOrder(
        manifest.hash,
        [shard.samples for shard in manifest.shards],
        seed=seed,
        chunk=data.chunk,
        global_batch=split.global_batch,
        subset=subset_ids(data.subset, where, manifest, seed=seed),
    )
    planner = TrainPlanner(order, Share(rank, split), images_seen)
    planner.plan(0)  # refuse an impossible images_seen here, not in a worker
    sampler = AugmentSampler(augment, input_size=data.input_size, seed=seed, draws=draws)
    reader = open_reader(data, where, manifest, split)
    if rank == 0:
        warn_of_small_cache(data, manifest, split)
    log = BadSampleLog(bad_samples_log, rank=rank, limit=data.max_bad_samples, directory=where)
    batches: Batches
    if data.backend_on(device.type) == "pil":
        dataset: torch.utils.data.Dataset[DecodedBatch]
        dataset = PilTrainSet(reader, planner, sampler, log.limit)
        if data.stream:
            dataset = _stream_set(data, manifest, planner, sampler, seed)
        batches = _worker_batches(dataset, data, device)
    else:
        source = TrainSource(reader, planner, sampler, log, data.prefetch)
        batches = _dali_batches(source, data, device, batch=split.micro_batch, augment=augment)
    normalizer = Normalizer(
        mean=augment.mean, std=augment.std, device=device, bytes_only=mixup.kernels_agree(device)
    )
    return TrainLoader(batches, normalizer, log, order=order, device=device)


def open_reader(
    data: DataConfig, where: Path | str, manifest: Manifest, split: Split | None = None
) -> ShardReader:
    """Samples of the shards at ``where``, through ``data.cache_dir`` where it is set.

    ``split``: of the batches they are trained in; None where they are read once, in turn.

    Raises:
        ConfigError: an address without ``data.cache_dir``.
    """
    return ShardReader(where, manifest, shard_cache(data, where, manifest, split))


def _stream_set(
    data: DataConfig,
    manifest: Manifest,
    planner: TrainPlanner,
    sampler: AugmentSampler,
    seed: int,
) -> torch.utils.data.Dataset[DecodedBatch]:
    from l2vit.data.stream import StreamTrainSet

    world = planner.share.split.world
    if planner.share.rank == 0:
        told = "data.stream is deprecated: set data.train to the address, and data.cache_dir"
        warnings.warn(told, FutureWarning, stacklevel=3)
    readers = world * max(1, data.threads)
    if readers > len(manifest.shards):
        raise ConfigError(
            f"data.stream: {len(manifest.shards)} shards are too few for {readers} readers"
            f" ({world} ranks × {max(1, data.threads)} workers)"
        )
    return StreamTrainSet(
        url=data.stream,
        directory=Path(data.train),
        manifest=manifest,
        planner=planner,
        sampler=sampler,
        seed=seed,
        buffer=data.stream_buffer,
        limit=data.max_bad_samples,
    )


def _worker_batches(
    dataset: torch.utils.data.Dataset[DecodedBatch],
    data: DataConfig,
    device: torch.device,
    count: int | None = None,
) -> WorkerBatches[DecodedBatch]:
    return WorkerBatches(
        dataset,
        workers=data.threads if count is None else min(data.threads, count),
        prefetch=data.prefetch,
        pin=device.type == "cuda",
        count=count,
    )


def _dali_batches(
    source: Source,
    data: DataConfig,
    device: torch.device,
    *,
    batch: int,
    augment: AugmentConfig | None = None,
    count: int | None = None,
) -> DaliBatches:
    index = None
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
    return DaliBatches(
        source,
        count=count,
        prefetch=data.prefetch,
        augment=augment,
        batch=batch,
        input_size=data.input_size,
        interpolation=augment.interpolation if augment else "bicubic",
        threads=max(1, data.threads),
        gpu=index is not None,
        device_id=index,
        hw_decoder_load=data.hw_decoder_load,
        region=index is None or dali_probe.region_decode_works(index, data.hw_decoder_load),
    )


class TrainLoader:
    """Endless iterator over one rank's micro-batches, in order."""

    def __init__(
        self,
        batches: Batches,
        normalizer: Normalizer,
        log: BadSampleLog,
        *,
        order: SampleOrder,
        device: torch.device,
    ) -> None:
        self.order = order
        self._log = log
        self._prefetcher = _Prefetcher(self._final(iter(batches), normalizer), device)

    def _final(
        self, decoded: Generator[DecodedBatch, None, None], normalizer: Normalizer
    ) -> Iterator[Batch]:
        with contextlib.closing(decoded):  # an error's traceback would keep its processes alive
            for batch in decoded:
                self._log.record(batch.bad, complete=batch.complete)
                yield normalizer(batch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._prefetcher)

    def close(self) -> None:
        """End the threads and processes that work ahead."""
        self._prefetcher.close()


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
        ConfigError: a crop or a batch that cannot be.
        UserError: no finished shard directory, or (while iterating) an image that cannot be used:
            an evaluation is exact or fails.
    """
    config.check(dataset)
    config.check(evaluation)
    where = dataset.data
    size = dataset.input_size or data.input_size
    crop = dataset.crop_fraction or evaluation.crop_fraction
    manifest = Manifest.load(where)
    planner = EvalPlanner(manifest.samples, rank, world, evaluation.batch)
    reader, log = open_reader(data, where, manifest), NoBadSamples(where)
    batches: Batches
    if data.backend_on(device.type) == "pil":
        pictures = PilEvalSet(
            reader,
            planner,
            input_size=size,
            crop_fraction=crop,
            crop_mode=evaluation.crop_mode,
        )
        batches = _worker_batches(pictures, data, device, planner.filled)
    else:
        source = EvalSource(reader, planner, size, crop, evaluation.crop_mode, log)
        sized = dataclasses.replace(data, input_size=size)
        batches = _dali_batches(source, sized, device, batch=evaluation.batch, count=planner.filled)
    normalizer = Normalizer(mean=augment.mean, std=augment.std, device=device)
    return EvalLoader(manifest, planner, batches, normalizer, log, size)


class EvalLoader:
    """Re-iterable over one rank's evaluation batches; as many on every rank."""

    def __init__(
        self,
        manifest: Manifest,
        planner: EvalPlanner,
        batches: Batches,
        normalizer: Normalizer,
        log: NoBadSamples,
        input_size: int,
    ) -> None:
        self.manifest = manifest
        self._planner, self._batches = planner, batches
        self._normalizer, self._log, self._size = normalizer, log, input_size

    def __len__(self) -> int:
        return len(self._planner)

    def __iter__(self) -> Iterator[Batch]:
        if self._planner.filled:
            for batch in self._batches:
                self._log.record(batch.bad, complete=batch.complete)
                yield self._normalizer(batch)
        for number in range(self._planner.filled, len(self._planner)):
            yield self._normalizer(self._empty(number))

    def _empty(self, number: int) -> DecodedBatch:
        pixels = torch.empty((0, self._size, self._size, 3), dtype=torch.uint8)
        nothing = np.zeros(0, np.int64)
        return DecodedBatch(self._planner.plan(number), nothing, nothing, pixels)

    def close(self) -> None:
        """End what works ahead."""
        self._batches.close()


class _Prefetcher:
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
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        # A thread that still computes when the interpreter goes down aborts the process.
        atexit.register(self.close)
        self._thread.start()

    def _run(self) -> None:
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
        self._thread.join(_CLOSING_SECONDS)
        self._items = iter(())
