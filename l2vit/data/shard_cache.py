"""Shards read through a cache on a local disk: from an address, or from a slow file system.

The unit is a run of neighbouring samples of one shard, a quarter of the order's chunk: the places
of one batch read from hundreds of shards at once, so whole shards would have to be there before
the first step. Where the cache holds less than the data, units and what is fetched ahead shrink to
what it does hold until it is used. A unit is checked by the shard's checksums when it arrives; an
index by the hash in the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from l2vit.data.cache import EVICT_TO, RangeCache
from l2vit.data.config import DataConfig
from l2vit.data.manifest import Manifest, ShardNames
from l2vit.data.order import Split, order_chunk
from l2vit.data.shared_array import SharedArray
from l2vit.data.storage import SILENT_SECONDS, Source, is_remote, open_source
from l2vit.errors import ConfigError, UserError

AHEAD_BATCHES = 32
"""Batches whose units are fetched ahead of the one being made."""
_FETCHERS = 4
"""Threads of each process that fetch ahead."""
_JOINED_BYTES, _GAP_BYTES = 4 << 20, 512 << 10
"""Units of one shard fetched by one request: so many bytes in all, so many unwanted between two."""
_TRIES = 3
"""Downloads of a unit whose checksums disagree, before its samples count as bad."""


class Layout(Protocol):
    """What a shard's index tells of it."""

    def span(self, shard: int, first: int, count: int) -> tuple[int, int]:
        """First byte of sample ``first`` and end of the last of ``count`` samples."""

    def is_checked(self, shard: int) -> bool:
        """Whether a shard has checksums."""

    def is_sound(self, shard: int, first: int, count: int, start: int, content: bytes) -> bool:
        """Whether samples in ``content``, which begins at byte ``start``, have their checksums."""


class Window(NamedTuple):
    """How much is fetched."""

    samples: int
    """Samples of one unit."""
    ahead: int = AHEAD_BATCHES
    """Batches whose units are fetched ahead of the one being made."""
    spend: bool = False
    """Whether a unit whose last sample was read is the first to go."""


class ShardCache:
    """The shards of one manifest by ranges of samples. Picklable; threads may share it.

    Args:
        source: where the shards are.
        manifest: theirs.
        ranges: the cache they go through.
        window: how much is fetched.
    """

    def __init__(
        self, source: Source, manifest: Manifest, ranges: RangeCache, window: Window
    ) -> None:
        self.source, self._ranges, self.window = source, ranges, window
        self._samples = window.samples
        self._folder = manifest.hash[:16]
        self._names = ShardNames(manifest.shards)
        hashes = b"".join(bytes.fromhex(shard.index_sha256) for shard in manifest.shards)
        self._index_hashes = SharedArray(np.frombuffer(hashes, np.uint8).reshape(-1, 32))
        self._reset()

    def _reset(self) -> None:
        self._queue: queue.Queue[tuple[Layout, int, list[int]]] = queue.Queue()
        self._announced: set[tuple[int, int]] = set()
        self._fetched = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        kept = ("source", "_ranges", "window", "_samples", "_folder", "_names", "_index_hashes")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    def index(self, shard: int) -> bytes:
        """The index of a shard.

        Raises:
            UserError: not the one the manifest names.
        """
        name = _with_suffix(self._names[shard], ".idx")
        return self._ranges.read(f"{self._folder}/{name}", lambda: self._fetch_index(shard, name))

    def open_index(self, shard: int) -> int:
        """A descriptor of the index of a shard, readable whatever is evicted meanwhile."""
        path = self._ranges.root / self._folder / _with_suffix(self._names[shard], ".idx")
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY)
        content = self.index(shard)
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY)
        descriptor = os.memfd_create(path.name)
        os.write(descriptor, content)
        return descriptor

    def checksums(self, shard: int) -> np.ndarray | None:
        """(samples,) uint32; None where the shard has no checksum file."""
        name = _with_suffix(self._names[shard], ".crc")

        def fetch() -> bytes:
            try:
                return self.source.read(name)
            except FileNotFoundError:
                return b""

        content = self._ranges.read(f"{self._folder}/{name}", fetch)
        return np.frombuffer(content, "<u4") if content else None

    def read(self, layout: Layout, shard: int, number: int, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of a shard's tar, which belong to sample ``number``."""
        unit = number // self._samples
        if self.window.spend and self._process == os.getpid():
            with self._fetched:  # rather than ask for one unit of those asked for together
                self._fetched.wait_for(
                    lambda: (shard, unit) not in self._announced, timeout=SILENT_SECONDS
                )
        begin, _ = layout.span(shard, unit * self._samples, self._samples)
        return self._ranges.read(
            self._unit_name(shard, unit),
            lambda: self._fetch(layout, shard, unit),
            start - begin,
            stop - start,
            last=self.window.spend and number % self._samples == self._samples - 1,
            sync=self._needs_sync(layout, shard),
        )

    def drop(self, shard: int, number: int) -> None:
        """Fetch the unit of sample ``number`` again when it is next read."""
        self._ranges.drop(self._unit_name(shard, number // self._samples))

    def announce(self, layout: Layout, shard: int, numbers: Sequence[int]) -> None:
        """Fetch the units of samples ``numbers`` in the background."""
        if self._process != os.getpid():
            self._reset()
        units = sorted({number // self._samples for number in numbers})
        units = [unit for unit in units if (shard, unit) not in self._announced]
        if not units:
            return
        self._announced.update((shard, unit) for unit in units)
        if not self._threads:
            for _ in range(_FETCHERS):
                thread = threading.Thread(target=self._work, name="fetch", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._queue.put((layout, shard, units))

    def _work(self) -> None:
        while True:
            layout, shard, units = self._queue.get()
            with contextlib.suppress(Exception):  # whoever reads it will be told
                for together in self._joined(layout, shard, units):
                    self._add(layout, shard, together)
            with self._fetched:
                self._announced.difference_update((shard, unit) for unit in units)
                self._fetched.notify_all()

    def _joined(self, layout: Layout, shard: int, units: list[int]) -> Iterator[list[int]]:
        """``units`` in groups that one request is to fetch."""
        group: list[int] = []
        first = end = 0
        for unit in units:
            start, stop = layout.span(shard, unit * self._samples, self._samples)
            if group and (start - end > _GAP_BYTES or stop - first > _JOINED_BYTES):
                yield group
                group = []
            if not group:
                first = start
            group.append(unit)
            end = stop
        yield group

    def _add(self, layout: Layout, shard: int, units: list[int]) -> None:
        """Fetch what is missing of ``units`` by one request."""
        named = {self._unit_name(shard, unit): unit for unit in units}

        def fetch(missing: list[str]) -> Iterator[tuple[str, bytes]]:
            if len(missing) == 1:
                yield missing[0], self._fetch(layout, shard, named[missing[0]])
                return
            firsts = [named[name] * self._samples for name in missing]
            spans = [layout.span(shard, first, self._samples) for first in firsts]
            begin = spans[0][0]
            joined = self.source.read(self._names[shard], begin, spans[-1][1])
            for name, first, (start, stop) in zip(missing, firsts, spans, strict=True):
                content = joined[start - begin : stop - begin]
                if not layout.is_sound(shard, first, self._samples, start, content):
                    content = self._fetch(layout, shard, named[name])
                yield name, content

        self._ranges.add_missing(list(named), fetch, sync=self._needs_sync(layout, shard))

    def _needs_sync(self, layout: Layout, shard: int) -> bool:
        """Not where a unit is used up soon, and what a power cut did to it would be seen."""
        return not (self.window.spend and layout.is_checked(shard))

    def _unit_name(self, shard: int, unit: int) -> str:
        stem = Path(self._names[shard]).stem
        return f"{self._folder}/{stem}/{unit * self._samples}-{self._samples}"

    def _fetch(self, layout: Layout, shard: int, unit: int) -> bytes:
        first = unit * self._samples
        start, stop = layout.span(shard, first, self._samples)
        for _ in range(_TRIES):
            content = self.source.read(self._names[shard], start, stop)
            if layout.is_sound(shard, first, self._samples, start, content):
                break
        return content

    def _fetch_index(self, shard: int, name: str) -> bytes:
        for _ in range(_TRIES):
            content = self.source.read(name)
            if hashlib.sha256(content).digest() == self._index_hashes.values[shard].tobytes():
                return content
        raise UserError(f"{self.source.address}/{name} is not the index that the manifest names")


def _with_suffix(name: str, suffix: str) -> str:
    return Path(name).with_suffix(suffix).name


def shard_cache(
    data: DataConfig, where: Path | str, manifest: Manifest, split: Split | None = None
) -> ShardCache | None:
    """The cache that shards at ``where`` are read through; None where they are read directly.

    Args:
        data: names the cache and its size.
        where: the shards.
        manifest: theirs.
        split: of the batches they are trained in; None where they are read once, in turn.

    Raises:
        ConfigError: an address without ``data.cache_dir``.
        UserError: the cache cannot be written.
    """
    if not data.cache_dir:
        if is_remote(where):
            raise ConfigError(
                f"data.cache_dir is required to read {open_source(where).address}: a directory on"
                " a local disk, shared by the ranks of a node"
            )
        return None
    ranges = RangeCache(Path(data.cache_dir), int(data.cache_gib * 2**30))
    window = Window(max(1, data.chunk // 4))
    if split is not None:
        window = fitting_window(data, manifest, split)
    return ShardCache(open_source(where), manifest, ranges, window)


def fitting_window(data: DataConfig, manifest: Manifest, split: Split) -> Window:
    """What may be fetched so that the cache holds it until it is used.

    Every place of the batches reads a run of its own: two units of it, and what is fetched ahead.
    """
    unit = max(1, data.chunk // 4)
    stored = sum(shard.bytes for shard in manifest.shards)
    held = EVICT_TO * data.cache_gib * 2**30
    if held >= stored:
        return Window(unit)
    samples, places = held * manifest.samples / stored, _places(split)
    unit = min(unit, order_chunk(data.chunk, manifest.samples, split.global_batch))
    while unit > 1 and places * (2 * unit + AHEAD_BATCHES / split.accumulation + 1) > samples:
        unit //= 2
    ahead = int((samples / places - 2 * unit - 1) * split.accumulation)
    return Window(unit, min(AHEAD_BATCHES, max(1, ahead)), spend=True)


def _places(split: Split) -> int:
    """Places of the global batch that the ranks of a node have."""
    ranks = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), split.world)
    return split.global_batch // split.world * ranks


def warn_of_small_cache(data: DataConfig, manifest: Manifest, split: Split) -> None:
    """Say so where ``data.cache_gib`` holds less than the batch in hand and the one after it."""
    if not data.cache_dir:
        return
    stored = sum(shard.bytes for shard in manifest.shards)
    needed = min(stored, 2 * _places(split) * stored / manifest.samples) / EVICT_TO / 2**30
    if data.cache_gib < needed:
        warnings.warn(
            f"data.cache_gib: {data.cache_gib:g} is less than two batches of the ranks of a node,"
            " so samples will be fetched again and again, each by a request of its own; set at"
            f" least {needed:.3g}",
            stacklevel=2,
        )
