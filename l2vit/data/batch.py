"""The three stages of a micro-batch: planned, decoded, final.

``BatchPlan`` says which samples; a backend (``pil`` or ``dali``) makes a ``DecodedBatch`` of
bytes from it, in another process or ahead of time; ``Normalizer`` turns that into the ``Batch``
the model sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from l2vit.data import erasing
from l2vit.data.augment import AugmentParams, erase_values
from l2vit.data.bad_samples import BadRecord
from l2vit.data.order import SampleOrder, Share
from l2vit.data.rng import LATEST_DRAWS
from l2vit.data.shards import BadSample, Sample, ShardReader

T = TypeVar("T")


@dataclass(frozen=True)
class BatchPlan:
    """One batch to make: which samples, for which places."""

    number: int
    epoch: int
    ids: np.ndarray
    """(n,) int64 sample ids."""
    positions: np.ndarray
    """(n,) int64 places in the epoch's global sequence."""


@dataclass
class DecodedBatch:
    """A batch in bytes, with what is still to be erased and what was found bad on the way."""

    plan: BatchPlan
    ids: np.ndarray
    """(n,) int64; differs from the plan's where a bad sample was replaced."""
    labels: np.ndarray
    """(n,) int64, each the label stored with the sample in ``ids``."""
    pixels: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """(n, S, S, 3) uint8, on the CPU or already on the device."""
    erase_boxes: np.ndarray | None = None
    """(n, 4) int64: top, left, height, width; height 0 for none."""
    erase_keys: np.ndarray | None = None
    """(n,) uint64: keys of the boxes' noise, to be drawn on the device."""
    erase_values: torch.Tensor | None = None
    """(sum of height · width, 3) float32, the boxes' new pixels one after another; instead of keys
    where draws are of version 1."""
    bad: list[BadRecord] = field(default_factory=list)
    complete: bool = True
    """False if the limit of bad samples was passed before every place was filled."""

    def draw_erasing(self, params: AugmentParams, *, draws: int = LATEST_DRAWS) -> None:
        """Take the erased boxes of ``params``; version 1 of ``draws`` makes their pixels here."""
        self.erase_boxes = params.erase
        if draws == 1:
            self.erase_values = torch.from_numpy(erase_values(params.erase, params.noise_keys))
        else:
            self.erase_keys = params.noise_keys

    def pin_memory(self) -> DecodedBatch:
        """Move the large parts to page-locked memory; torch's data loader calls this."""
        self.pixels = self.pixels.pin_memory()
        if self.erase_values is not None:
            self.erase_values = self.erase_values.pin_memory()
        return self


@dataclass
class Batch:
    """One micro-batch of one rank, as the model sees it.

    Training batches hold ``micro_batch`` samples always. Evaluation batches may be shorter at
    the end; every rank then yields the same number of batches, some of them perhaps empty.
    """

    images: torch.Tensor
    """(B, 3, H, W), channels-last in memory, on the loader's device: float32, normalised and
    erased; or uint8 and neither, where ``Mixer`` does all in one pass."""
    labels: torch.Tensor
    """(B,) int64 on the loader's device."""
    sample_ids: np.ndarray
    """(B,) int64: which sample of the manifest each image is."""
    positions: np.ndarray
    """(B,) int64: place of each image in the epoch's global sequence."""
    epoch: int
    erase_boxes: np.ndarray | None = None
    """Of images in bytes: as of ``DecodedBatch``."""
    erase_keys: np.ndarray | None = None
    """Of images in bytes: as of ``DecodedBatch``."""

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True)
class TrainPlanner:
    """A rank's micro-batches in order, from ``images_seen`` on, without end."""

    order: SampleOrder
    share: Share
    images_seen: int

    def plan(self, number: int) -> BatchPlan:
        """The ``number``-th micro-batch after ``images_seen``."""
        step, micro_step = divmod(number, self.share.split.accumulation)
        seen = self.images_seen + step * self.share.split.global_batch
        epoch, first = self.order.locate(seen)
        positions = first + self.share.places(micro_step)
        return BatchPlan(number, epoch, self.order.ids_at(epoch, positions), positions)


@dataclass(frozen=True)
class EvalPlanner:
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

    def plan(self, number: int) -> BatchPlan:
        """Batch ``number`` of this rank: neighbours in the shards."""
        begin, end = self._bounds()
        first = min(begin + number * self.batch, end)
        ids = np.arange(first, min(first + self.batch, end), dtype=np.int64)
        return BatchPlan(number, 0, ids, ids)


def read_batch(
    reader: ShardReader,
    plan: BatchPlan,
    accept: Callable[[Sample], T],
    *,
    following: Callable[[int], int],
    limit: int,
) -> tuple[DecodedBatch, list[T]]:
    """Read a batch's samples, the next good one of the manifest in the place of each bad one.

    Args:
        reader: where samples come from.
        plan: which samples.
        accept: turns a sample into what is needed of it; raises BadSample to refuse it.
        following: the sample that stands in for one.
        limit: bad samples after which to give up.

    Returns:
        The batch, its pixels still to be filled in, and what ``accept`` gave for each sample.
    """
    used, labels, accepted = plan.ids.copy(), np.zeros(len(plan.ids), np.int64), []
    bad: dict[int, BadRecord] = {}
    for place, wanted in enumerate(used.tolist()):
        sample_id = wanted
        while True:
            try:
                sample = reader.read(sample_id)
                accepted.append(accept(sample))
                break
            except BadSample as error:
                key, shard = reader.key_of(sample_id), reader.shard_name(sample_id)
                bad[sample_id] = BadRecord(sample_id, key, shard, str(error))
                sample_id = following(sample_id)
                if len(bad) > limit or sample_id == wanted:  # too many, or none is good
                    ids, labels = used[:place], labels[:place]
                    found = list(bad.values())
                    return DecodedBatch(plan, ids, labels, bad=found, complete=False), accepted
        used[place], labels[place] = sample_id, sample.label
    return DecodedBatch(plan, used, labels, bad=list(bad.values())), accepted


def in_bytes(values: tuple[float, float, float]) -> torch.Tensor:
    """A mean or a standard deviation as one of bytes: (3,) float32 in 0 … 255."""
    return 255 * torch.tensor(values, dtype=torch.float32)


class Normalizer:
    """Turns decoded batches into batches on ``device``.

    Args:
        mean, std: of the three channels, in 0 … 1.
        device: where batches go.
        bytes_only: leave normalising and erasing to ``Mixer``, which does both as it mixes.
    """

    def __init__(
        self,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        bytes_only: bool = False,
    ) -> None:
        self._device, self._bytes_only = device, bytes_only
        self._mean, self._std = in_bytes(mean).to(device), in_bytes(std).to(device)

    def __call__(self, decoded: DecodedBatch) -> Batch:
        """Normalise (x − 255 mean) / (255 std), then erase; channels-last in memory."""
        images = decoded.pixels.to(self._device, non_blocking=True)
        bytes_only = self._bytes_only and decoded.erase_values is None
        if not bytes_only:
            images = images.float().sub_(self._mean).div_(self._std)
            self._erase(images, decoded)
        labels = torch.from_numpy(decoded.labels).to(self._device, non_blocking=True)
        return Batch(
            images=images.permute(0, 3, 1, 2),
            labels=labels,
            sample_ids=decoded.ids,
            positions=decoded.plan.positions,
            epoch=decoded.plan.epoch,
            erase_boxes=decoded.erase_boxes if bytes_only else None,
            erase_keys=decoded.erase_keys if bytes_only else None,
        )

    def _erase(self, images: torch.Tensor, decoded: DecodedBatch) -> None:
        if decoded.erase_boxes is None:
            return
        if decoded.erase_keys is not None:
            erasing.erase(images, decoded.erase_boxes, decoded.erase_keys)
        elif decoded.erase_values is not None:
            values = decoded.erase_values.to(self._device, non_blocking=True)
            erasing.fill(images, decoded.erase_boxes, values)
