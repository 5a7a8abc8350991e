"""Training pictures in the order of a run, made ahead by worker processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from l2vit.data.order import Share
from l2vit.data.workers import WorkerBatches
from l2vit.dense.coco import CocoSet
from l2vit.dense.config import DetectAugmentConfig, SegmentAugmentConfig
from l2vit.dense.draws import Draws
from l2vit.dense.order import GroupedOrder
from l2vit.dense.scenes import SceneSet
from l2vit.dense.transforms import detection_picture, read_picture, segmentation_picture
from l2vit.errors import UserError


@dataclass
class DetectionPictures:
    """Makes a picture (3, H, W) of bytes and its target; picklable."""

    data: CocoSet
    augment: DetectAugmentConfig
    masks: bool
    seed: int

    def __call__(self, epoch: int, number: int) -> tuple[Tensor, dict[str, Any]]:
        """The picture ``number`` as it looks in ``epoch``.

        Raises:
            UserError: it cannot be decoded, or is not of the size that the json says.
        """
        path = self.data.images / self.data.files[number]
        picture = read_picture(path)
        told = tuple(self.data.sizes[number].tolist())
        if picture.shape[-2:] != torch.Size(told):
            found = tuple(picture.shape[-2:])
            raise UserError(f"picture {path} is {found} high and wide, not {told} as the json says")
        target = self.data.target(number, masks=self.masks)
        draws = Draws("detection", self.seed, epoch, number)
        return detection_picture(picture, target, self.augment, draws)


@dataclass
class ScenePictures:
    """Makes a picture (3, H, W) and its labels (H, W), both bytes; picklable."""

    data: SceneSet
    augment: SegmentAugmentConfig
    seed: int

    def __call__(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """The picture ``number`` as it looks in ``epoch``.

        Raises:
            UserError: either file cannot be decoded, or they differ in size.
        """
        path = self.data.pictures[number]
        picture, labels = read_picture(path), self.data.label_map(number)
        if picture.shape[-2:] != labels.shape:
            raise UserError(f"picture {path} and its label map differ in size")
        draws = Draws("segmentation", self.seed, epoch, number)
        return segmentation_picture(picture, labels, self.augment, draws)


@dataclass
class MicroBatch:
    """What a worker makes: pictures and targets, not yet padded to one size."""

    sample_ids: np.ndarray
    pictures: list[Tensor]
    targets: list[Any]

    def pin_memory(self) -> MicroBatch:
        """Into page-locked memory; torch's loader calls it."""
        return MicroBatch(self.sample_ids, pin_memory(self.pictures), pin_memory(self.targets))


@dataclass
class MicroBatches(torch.utils.data.Dataset[Any]):
    """The micro-batches of one rank by number, counted from ``images_seen`` on."""

    order: GroupedOrder
    share: Share
    make: Callable[[int, int], tuple[Tensor, Any]]
    images_seen: int

    def __getitem__(self, number: int) -> MicroBatch:
        step, micro_step = divmod(number, self.share.split.accumulation)
        seen = self.images_seen + step * self.order.global_batch
        epoch, ids = self.order.batch_ids(seen)
        ids = ids[self.share.places(micro_step)]
        made = [self.make(epoch, int(sample)) for sample in ids]
        return MicroBatch(ids, [picture for picture, _ in made], [target for _, target in made])


class PictureLoader:
    """Endless micro-batches of one rank.

    Args:
        batches: what is made.
        workers: processes that work ahead; 0 for none.
        prefetch: micro-batches ready ahead in each.
        device: where pictures and targets go.
    """

    def __init__(
        self, batches: MicroBatches, *, workers: int, prefetch: int, device: torch.device
    ) -> None:
        self.order = batches.order
        self._device = device
        pin = device.type == "cuda"
        made: Any = WorkerBatches(batches, workers=workers, prefetch=prefetch, pin=pin)
        self._batches = iter(made)

    def __next__(self) -> MicroBatch:
        batch: MicroBatch = next(self._batches)
        pictures, targets = self._moved(batch.pictures), self._moved(batch.targets)
        return MicroBatch(batch.sample_ids, pictures, targets)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._device, non_blocking=True)
        if isinstance(value, list):
            return [self._moved(each) for each in value]
        if isinstance(value, dict):
            return {key: self._moved(each) for key, each in value.items()}
        return value

    def close(self) -> None:
        """End the workers."""
        self._batches.close()
