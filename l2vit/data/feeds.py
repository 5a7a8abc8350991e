"""What the DALI graph is fed: bytes read by us, in our order, with what was drawn for them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from l2vit.data.bad_samples import BadSampleLog, NoBadSamples, fetch
from l2vit.data.dali_loader import Feed
from l2vit.data.draws import Drawer, Drawn
from l2vit.data.plan import EvalPlan, TrainPlan
from l2vit.data.raw import Erasing
from l2vit.data.shards import Sample, ShardReader, image_size


@dataclass(frozen=True)
class _Encoded:
    image: bytes
    size: tuple[int, int]
    """Height, width."""


def _accept(sample: Sample, *, check: Callable[[Sample], None]) -> _Encoded:
    check(sample)
    return _Encoded(sample.image, image_size(sample.image))


@dataclass
class TrainExtra:
    """What training needs back with the pixels."""

    drawn: Drawn
    erasing: Erasing


@dataclass
class TrainFeeds:
    """Training micro-batches for the graph, by number."""

    reader: ShardReader
    plan: TrainPlan
    drawer: Drawer
    input_size: int
    limit: int
    log: BadSampleLog
    ahead: int
    """Batches whose bytes the system is asked for ahead of time."""

    def __call__(self, number: int, *, check: Callable[[Sample], None]) -> Feed:
        work = self.plan.work(number)
        first = number + self.ahead if number else 1
        for upcoming in range(first, number + self.ahead + 1):
            self.reader.announce(self.plan.work(upcoming).ids)
        fetched = fetch(
            self.reader,
            work.ids,
            functools.partial(_accept, check=check),
            following=self.plan.order.following,
            limit=self.limit,
        )
        self.log.record(fetched.bad, complete=fetched.complete)
        drawn = self.drawer.draw(work.epoch, work.ids)
        sizes = np.array([encoded.size for encoded in fetched.payloads])
        count = len(work.ids)
        return Feed(
            work=work,
            ids=fetched.ids,
            labels=fetched.labels,
            images=[encoded.image for encoded in fetched.payloads],
            boxes=self.drawer.boxes(drawn, sizes),
            sizes=np.full((count, 2), self.input_size),
            windows=np.zeros((count, 2), np.int64),
            flip=drawn.flip,
            extra=TrainExtra(drawn, Erasing.draw(drawn.erase, drawn.noise_keys)),
        )


@dataclass
class EvalFeeds:
    """Evaluation batches for the graph, by number; what timm's evaluation transform does."""

    reader: ShardReader
    plan: EvalPlan
    input_size: int
    crop_fraction: float
    crop_mode: str
    log: NoBadSamples

    def __call__(self, number: int, *, check: Callable[[Sample], None]) -> Feed:
        work = self.plan.work(number)
        fetched = fetch(
            self.reader,
            work.ids,
            functools.partial(_accept, check=check),
            following=lambda sample_id: sample_id,
            limit=0,
        )
        self.log.record(fetched.bad, complete=fetched.complete)
        sizes = np.array([encoded.size for encoded in fetched.payloads])
        resized = eval_sizes(sizes, self.input_size, self.crop_fraction, self.crop_mode)
        return Feed(
            work=work,
            ids=fetched.ids,
            labels=fetched.labels,
            images=[encoded.image for encoded in fetched.payloads],
            boxes=np.concatenate([np.zeros_like(sizes), sizes], axis=1),
            sizes=resized,
            windows=np.rint((resized - self.input_size) / 2).astype(np.int64),
            flip=np.zeros(len(sizes), bool),
        )


def eval_sizes(
    sizes: np.ndarray, input_size: int, crop_fraction: float, crop_mode: str
) -> np.ndarray:
    """What images of ``sizes`` (n, 2: height, width) are resized to before the central crop.

    ``center``: the short side becomes ⌊input_size / crop_fraction⌋ and the ratio is kept;
    ``squash``: both sides do.
    """
    side = math.floor(input_size / crop_fraction)
    if crop_mode == "squash":
        return np.full_like(sizes, side)
    short = sizes.min(axis=1, keepdims=True)
    return np.where(sizes == short, side, (side * sizes / short).astype(np.int64))
