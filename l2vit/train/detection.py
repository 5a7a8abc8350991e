"""Detection as a `Task`: COCO-style data, RetinaNet or Mask R-CNN, COCO's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2vit import files
from l2vit.data.contact_sheet import to_bytes
from l2vit.data.manifest import class_hash
from l2vit.data.order import Share, Split
from l2vit.dense import build, coco, inference
from l2vit.dense.coco import CocoSet
from l2vit.dense.config import (
    DetectAugmentConfig,
)
from l2vit.dense.count import count_detector
from l2vit.dense.drawing import draw_detections, one_sheet
from l2vit.dense.loader import DetectionPictures, MicroBatch, MicroBatches, PictureLoader
from l2vit.dense.order import GroupedOrder
from l2vit.dense.sizes import fitted_size
from l2vit.dense.transforms import PADDING, padded_batch
from l2vit.errors import ConfigError, UserError
from l2vit.train import dense_weights
from l2vit.train.dense_config import DetectConfig
from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.evaluation import raw_and_average
from l2vit.train.task import Evaluator, Loader, Report, TrainBatch, TrainingData

Targets = list[dict[str, Any]]
PARTS = "evaluation"
"""Folder of the run directory where ranks leave their detections for rank 0."""
_SHOWN = 6
_TRIAL_OBJECTS = 20


class Detection:
    """Learns to find the objects of a COCO-style json.

    Raises:
        ConfigError: it is not said where the data are.
        UserError: the json or a picture of it is not usable; names the entry.
    """

    headline = "/bbox_AP"
    batch_multiple_key = "data.group"
    exact_order = True

    def __init__(self, config: DetectConfig) -> None:
        self._config = config
        path, images = config.data.places("train")
        self._set = CocoSet.read(path, images)
        self.batch_multiple = config.data.group
        names = self._set.names
        self.data = TrainingData(
            classes=names,
            class_names=names,
            class_hash=class_hash(names),
            manifest_hash=files.sha256_file(path),
            provenance={"annotations": str(path), "pictures": len(self._set)},
            where=str(path),
        )

    @property
    def _first_label(self) -> int:
        return int(self._config.model.head == "mask_rcnn")  # 0 is its background

    def network(self) -> nn.Module:
        """The detector with fresh weights."""
        config = self._config
        torch.manual_seed(config.run.seed)
        return make_network(config, len(self.data.classes))

    def initialise(self, network: nn.Module) -> Report | None:
        """The backbone of a classifier, or another detector."""
        init = self._config.init
        if not init.source:
            return None
        settings, classes = self._config.model, self.data.classes
        return dense_weights.load_initial(network, init, model=settings, classes=classes)

    def flops_per_image(self, network: nn.Module) -> float:
        """Six times the products at the largest training size."""
        parts = count_detector(network, _largest(self._config.augment)).parts
        return 6 * sum(part["products"] for part in parts.values())

    def warnings(self, network: nn.Module) -> list[str]:
        """Pictures and boxes that are not trained on."""
        count = len(self._set) - len(self._set.trainable())
        lines = [f"{count:,} pictures without an annotation or too small left out"] if count else []
        return lines + self._set.left_out.lines()

    def trial_loss(self, network: nn.Module, images: int, device: torch.device) -> Tensor:
        """Losses of black pictures of the largest size with twenty objects each."""
        height, width = (-(-side // PADDING) * PADDING for side in _largest(self._config.augment))
        dtype, first = next(network.parameters()).dtype, self._first_label
        batch = torch.zeros(images, 3, height, width, dtype=dtype, device=device)
        corner = torch.arange(_TRIAL_OBJECTS, device=device)[:, None] * 8.0
        target = {
            "boxes": torch.cat([corner, corner, corner + 64, corner + 64], dim=1),
            "labels": torch.full((_TRIAL_OBJECTS,), first, device=device),
            "masks": torch.ones(_TRIAL_OBJECTS, height, width, dtype=torch.uint8, device=device),
            "size": (height, width),
        }
        losses = network(batch, [target] * images)
        return torch.stack(list(losses.values())).sum()

    def loader(self, split: Split, world: World, *, images_seen: int, directory: Path) -> Loader:
        """Training pictures in groups of one orientation."""
        config, chosen = self._config, self._set.trainable()
        order = GroupedOrder(
            self.data.manifest_hash,
            self._set.landscape()[chosen],
            seed=config.run.seed,
            group=config.data.group,
            global_batch=config.schedule.global_batch,
            numbers=chosen,
        )
        masks = config.model.head == "mask_rcnn"
        make = DetectionPictures(self._set, config.augment, masks, config.run.seed)
        return PictureLoader(
            MicroBatches(order, Share(world.rank, split), make, images_seen),
            workers=config.data.threads,
            prefetch=config.data.prefetch,
            device=world.device,
        )

    def prepare(self, batch: MicroBatch, *, steps_left: int) -> TrainBatch[Targets]:
        """Normalise and pad the pictures; labels as the network counts them."""
        first = self._first_label
        targets = [{**t, "labels": t["labels"] + first} for t in batch.targets]
        augment = self._config.augment
        images = padded_batch(batch.pictures, augment.mean, augment.std)
        return TrainBatch(images, targets, batch.sample_ids)

    def loss(self, engine: Engine, batch: TrainBatch[Targets]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the network's losses, and each of them."""
        losses = engine.forward(batch.images, batch.targets)
        total = torch.stack(list(losses.values())).sum()
        return total, {name: loss.detach() for name, loss in losses.items()}

    def evaluator(self, world: World, beat: Callable[[], None]) -> Evaluator:
        """COCO's figures on the validation pictures."""
        return DetectionEvaluator(self._config, self.data.classes, world=world, beat=beat)

    def pictures(self, images: Tensor) -> np.ndarray:
        """The pictures with the normalisation undone."""
        return to_bytes(images, self._config.augment.mean, self._config.augment.std)

    def sample_keys(self, sample_ids: Sequence[int]) -> list[str]:
        """File names."""
        return [self._set.files[sample] for sample in sample_ids]


def make_network(config: DetectConfig, classes: int) -> nn.Module:
    """The detector of a configuration."""
    return build.detector(
        config.model,
        config.augment,
        config.eval,
        classes=classes,
        grad_checkpointing=config.engine.grad_checkpointing,
    )


def _largest(augment: DetectAugmentConfig) -> tuple[int, int]:
    short = max(augment.short_sides)
    return fitted_size(short, augment.long_side, short=short, long=augment.long_side)


class DetectionEvaluator:
    """COCO's figures on the validation set; every rank detects a share, rank 0 scores."""

    def __init__(
        self,
        config: DetectConfig,
        classes: Sequence[str],
        *,
        world: World,
        beat: Callable[[], None],
    ) -> None:
        self._world, self._beat = world, beat
        self._folder = Path(config.run.dir) / PARTS
        self._names = tuple(classes)
        self._shown: list[Tensor] = []
        self._set: CocoSet | None = None
        data = config.data
        if not data.root and not data.val_json:
            return
        self._set = CocoSet.read(*data.places("val"))
        if self._set.names != self._names:
            raise ConfigError(f"{self._set.path} has other categories than the training data")

    def run(self, engine: Engine) -> dict[str, float]:
        """``val/bbox_AP`` and so on with the raw weights, ``val_ema/...`` with the average."""
        if self._set is None:
            return {}
        data = self._set
        return raw_and_average(
            engine, lambda suffix: self._measure(engine.module, data, f"val{suffix}")
        )

    def picture(self) -> np.ndarray | None:
        """The first pictures with what was found in them at the last evaluation."""
        return one_sheet(self._shown) if self._shown else None

    def close(self) -> None:
        """Nothing works ahead."""

    def _measure(self, model: nn.Module, data: CocoSet, name: str) -> dict[str, float]:
        found = score_with_ranks(
            model, data, self._folder, world=self._world, beat=self._beat, show=self._show
        )
        return {f"{name}/{key}": value for key, value in found.figures.items()}

    def _show(self, place: int, picture: Tensor, found: dict[str, Tensor]) -> None:
        if not self._world.main:
            return
        if place == 0:
            self._shown = []
        if len(self._shown) < _SHOWN:
            self._shown.append(draw_detections(picture, found, self._names))


@dataclass
class DetectionScore:
    """What an evaluation of a detector found; entries and curves on rank 0 alone."""

    figures: dict[str, float]
    kinds: dict[str, coco.CocoScores] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)


def score_with_ranks(
    model: nn.Module,
    data: CocoSet,
    folder: Path,
    *,
    world: World,
    beat: Callable[[], None] = lambda: None,
    show: Callable[[int, Tensor, dict[str, Tensor]], None] | None = None,
) -> DetectionScore:
    """Detect with every rank and score on rank 0.

    Args:
        model: in evaluation mode.
        data: the set.
        folder: on a disk that all ranks see.
        world: this rank's place.
        beat: called before each picture, as often on every rank.
        show: sees this rank's pictures and detections, counted from 0.
    """
    numbers = inference.share_of(len(data), world.rank, world.size)
    problem: UserError | None = None
    try:
        seen = iter(range(len(numbers)))
        entries = inference.detect_all(
            model,
            data,
            numbers,
            beat=beat,
            show=None if show is None else lambda _, p, found: show(next(seen), p, found),
        )
        inference.write_part(entries, folder, world.rank, world.size)
        if len(numbers) < -(-len(data) // world.size):
            beat()
    except UserError as error:
        problem = error
    world.raise_on_all_ranks(problem)
    found = DetectionScore({})
    if world.main:
        found.entries = inference.merged(folder, world.size, data.image_ids.tolist())
        truth = coco.read_annotations(data.path)
        kinds = inference.kinds_of(model)
        found.kinds = {kind: coco.score(truth, found.entries, kind) for kind in kinds}
        found.figures = inference.named_figures(found.kinds)
    found.figures = world.broadcast(found.figures)
    return found
