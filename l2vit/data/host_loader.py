"""The host backend: PIL in worker processes, carrying out the same work as the DALI backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
