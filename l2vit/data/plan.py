"""What a loader is to produce, batch by batch: pure functions of a batch's number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from l2vit.data.order import SampleOrder, Share


@dataclass(frozen=True)
class Work:
    """One batch to make: which samples, for which places."""

    number: int
    epoch: int
    ids: np.ndarray
    """(n,) int64 sample ids."""
    positions: np.ndarray
    """(n,) int64 places in the epoch's global sequence."""


@dataclass(frozen=True)
class TrainPlan:
    """A rank's micro-batches in order, from ``images_seen`` on, without end."""

    order: SampleOrder
    share: Share
    images_seen: int

    def work(self, number: int) -> Work:
        """The ``number``-th micro-batch after ``images_seen``."""
        step, micro_step = divmod(number, self.share.split.accumulation)
        seen = self.images_seen + step * self.share.split.global_batch
        epoch, first = self.order.locate(seen)
        positions = first + self.share.places(micro_step)
        return Work(number, epoch, self.order.ids_at(epoch, positions), positions)


@dataclass(frozen=True)
class EvalPlan:
    """Every sample once over all ranks, in as many batches on each rank; the last ones of a rank
    may be short or empty."""

    samples: int
    rank: int
    world: int
    batch: int

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.samples / self.world) / self.batch)

    @property
    def filled(self) -> int:
        """Batches of this rank that hold any sample."""
        begin, end = self._bounds()
        return math.ceil((end - begin) / self.batch)

    def _bounds(self) -> tuple[int, int]:
        first, last = self.samples * self.rank, self.samples * (self.rank + 1)
        return first // self.world, last // self.world

    def work(self, number: int) -> Work:
        """Batch ``number`` of this rank: neighbours in the shards."""
        begin, end = self._bounds()
        first = min(begin + number * self.batch, end)
        ids = np.arange(first, min(first + self.batch, end), dtype=np.int64)
        return Work(number, 0, ids, ids)
