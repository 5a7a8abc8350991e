"""Shards read through a cache on a local disk: from an address, or from a slow file system.

The unit is a run of neighbouring samples of one shard, a quarter of the order's chunk: the places
of one batch read from hundreds of shards at once, so whole shards would have to be there before
the first step. A unit is checked by the shard's checksums when it arrives; an index by the hash
in the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import warnings
from pathlib import Path
from typing import Protocol

import numpy as np

from l2vit.data.cache import EVICT_TO, RangeCache
from l2vit.data.config import DataConfig
from l2vit.data.manifest import Manifest, ShardNames
from l2vit.data.order import Split
from l2vit.data.shared_array import SharedArray
from l2vit.data.storage import Source, is_remote, open_source
from l2vit.errors import ConfigError, UserError

AHEAD_BATCHES = 32
"""Batches whose units are fetched ahead of the one being made."""
_FETCHERS = 4
"""Threads of each process that fetch ahead."""
_TRIES = 3
"""Downloads of a unit whose checksums disagree, before its samples count as bad."""


class Layout(Protocol):
    """What a shard's index tells of it."""

    def span(self, shard: int, first: int, count: int) -> tuple[int, int]:
        """First byte of sample ``first`` and end of the last of ``count`` samples."""

    def is_sound(self, shard: int, first: int, count: int, start: int, content: bytes) -> bool:
        """Whether samples in ``content``, which begins at byte ``start``, have their checksums."""


class ShardCache:
    """The shards of one manifest by ranges of samples. Picklable; threads may share it.

    Args:
        source: where the shards are.
        manifest: theirs.
        ranges: the cache they go through.
        samples: samples of one unit.
    """

    def __init__(
        self, source: Source, manifest: Manifest, ranges: RangeCache, *, samples: int
    ) -> None:
        self.source, self._ranges, self._samples = source, ranges, samples
        self._folder = manifest.hash[:16]
        self._names = ShardNames(manifest.shards)
        hashes = b"".join(bytes.fromhex(shard.index_sha256) for shard in manifest.shards)
        self._index_hashes = SharedArray(np.frombuffer(hashes, np.uint8).reshape(-1, 32))
        self._reset()

    def _reset(self) -> None:
        self._queue: queue.Queue[tuple[Layout, int, int]] = queue.Queue()
        self._announced: set[tuple[int, int]] = set()
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        kept = ("source", "_ranges", "_samples", "_folder", "_names", "_index_hashes")
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
        begin, _ = layout.span(shard, unit * self._samples, self._samples)
        return self._ranges.read(
            self._unit_name(shard, unit),
            lambda: self._fetch(layout, shard, unit),
            start - begin,
            stop - start,
        )

    def drop(self, shard: int, number: int) -> None:
        """Fetch the unit of sample ``number`` again when it is next read."""
        self._ranges.drop(self._unit_name(shard, number // self._samples))

    def announce(self, layout: Layout, shard: int, number: int) -> None:
        """Fetch the unit of sample ``number`` in the background."""
        if self._process != os.getpid():
            self._reset()
        unit = number // self._samples
        if (shard, unit) in self._announced:
            return
        self._announced.add((shard, unit))
        if not self._threads:
            for _ in range(_FETCHERS):
                thread = threading.Thread(target=self._work, name="fetch", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._queue.put((layout, shard, unit))

    def _work(self) -> None:
        while True:
            layout, shard, unit = self._queue.get()
            with contextlib.suppress(Exception):  # whoever reads it will be told
                name = self._unit_name(shard, unit)
                self._ranges.ensure(name, lambda: self._fetch(layout, shard, unit))  # noqa: B023
            self._announced.discard((shard, unit))

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


def shard_cache(data: DataConfig, where: Path | str, manifest: Manifest) -> ShardCache | None:
    """The cache that shards at ``where`` are read through; None where they are read directly.

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
    return ShardCache(open_source(where), manifest, ranges, samples=max(1, data.chunk // 4))


def warn_of_small_cache(data: DataConfig, manifest: Manifest, split: Split) -> None:
    """Say so where ``data.cache_gib`` holds less than what a node's ranks read at once.

    Every place of the global batch reads a run of its own: two units of it, and what is fetched
    ahead. Below that, a unit is evicted before all of it was used, and fetched again and again.
    """
    if not data.cache_dir:
        return
    ranks = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), split.world)
    places = split.global_batch // split.world * ranks
    samples = places * (2 * max(1, data.chunk // 4) + AHEAD_BATCHES // split.accumulation + 1)
    stored = sum(shard.bytes for shard in manifest.shards)
    needed = min(stored, samples * stored / manifest.samples) / EVICT_TO / 2**30
    if data.cache_gib < needed:
        warnings.warn(
            f"data.cache_gib: {data.cache_gib:g} is less than what the ranks of a node read from at"
            f" once, so shards will be fetched again and again; set at least {needed:.3g}, or lower"
            f" data.chunk ({data.chunk})",
            stacklevel=2,
        )
