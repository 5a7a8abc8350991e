"""Segmentation as a `Task`: pictures with label maps, UPerNet, mean IoU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from l2vit.data.contact_sheet import to_bytes
from l2vit.data.manifest import class_hash
from l2vit.data.order import Share, Split
from l2vit.dense import build, inference
from l2vit.dense.config import (
    ScenesConfig,
)
from l2vit.dense.count import count_segmentor
from l2vit.dense.drawing import draw_labels, one_sheet
from l2vit.dense.loader import MicroBatch, MicroBatches, PictureLoader, ScenePictures
from l2vit.dense.order import GroupedOrder
from l2vit.dense.scenes import SceneSet, class_names
from l2vit.dense.scores import PixelCounts
from l2vit.dense.transforms import padded_batch, padded_labels
from l2vit.errors import ConfigError, UserError
from l2vit.train import dense_weights
from l2vit.train.dense_config import SegmentConfig
from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.evaluation import raw_and_average
from l2vit.train.task import Evaluator, Loader, Report, TrainBatch, TrainingData

_SHOWN = 6


class Segmentation:
    """Learns the class of every pixel.

    Raises:
        ConfigError: it is not said where the data are.
        UserError: a folder or a label map is missing; names it.
    """

    headline = "/mIoU"
    exact_order = True
    batch_multiple = 1
    batch_multiple_key = "schedule.global_batch"  # never named: 1 divides everything

    def __init__(self, config: SegmentConfig) -> None:
        self._config = config
        self._set = read_scenes(config.data, "training")
        names = names_of(config.data)
        self.data = TrainingData(
            classes=names,
            class_names=names,
            class_hash=class_hash(names),
            manifest_hash=self._set.identity,
            provenance={"pictures": len(self._set)},
            where=str(self._set.pictures[0].parent),
        )

    def network(self) -> nn.Module:
        """The segmentor with fresh weights, its heads' norms synchronised if asked for."""
        config = self._config
        torch.manual_seed(config.run.seed)
        network = make_network(config, len(self.data.classes))
        if self._synchronised():
            from l2vit.dense.segmentor import Segmentor, synchronise_norms

            assert isinstance(network, Segmentor)
            synchronise_norms(network)
        return network

    def _synchronised(self) -> bool:
        # torch's SyncBatchNorm refuses CPU tensors
        return self._config.model.head_norm == "sync" and torch.cuda.is_available()

    def initialise(self, network: nn.Module) -> Report | None:
        """The backbone of a classifier, or another segmentor."""
        init = self._config.init
        if not init.source:
            return None
        settings, classes = self._config.model, self.data.classes
        return dense_weights.load_initial(network, init, model=settings, classes=classes)

    def flops_per_image(self, network: nn.Module) -> float:
        """Six times the products on a crop."""
        side = self._config.augment.crop
        parts = count_segmentor(network, (side, side)).parts
        return 6 * sum(part["products"] for part in parts.values())

    def warnings(self, network: nn.Module) -> list[str]:
        """None: every picture is trained on."""
        return []

    def trial_loss(self, network: nn.Module, images: int, device: torch.device) -> Tensor:
        """Losses of black crops of the first class."""
        side, dtype = self._config.augment.crop, next(network.parameters()).dtype
        batch = torch.zeros(images, 3, side, side, dtype=dtype, device=device)
        labels = torch.zeros(images, side, side, dtype=torch.uint8, device=device)
        return torch.stack(list(network(batch, labels).values())).sum()

    def loader(self, split: Split, world: World, *, images_seen: int, directory: Path) -> Loader:
        """Training crops in random order."""
        config = self._config
        across = world.size if self._synchronised() else 1
        if split.micro_batch * across < 2:
            raise ConfigError(
                "engine.micro_batch: 1 gives the BatchNorm behind the 1×1 pooling a single value;"
                " it must be at least 2"
            )
        order = GroupedOrder(
            self.data.manifest_hash,
            np.zeros(len(self._set), np.int64),
            seed=config.run.seed,
            group=1,
            global_batch=config.schedule.global_batch,
        )
        make = ScenePictures(self._set, config.augment, config.run.seed)
        return PictureLoader(
            MicroBatches(order, Share(world.rank, split), make, images_seen),
            workers=config.data.threads,
            prefetch=config.data.prefetch,
            device=world.device,
        )

    def prepare(self, batch: MicroBatch, *, steps_left: int) -> TrainBatch[Tensor]:
        """Normalise the crops and pad them and their labels to the crop's size."""
        augment = self._config.augment
        images = padded_batch(batch.pictures, augment.mean, augment.std, augment.crop)
        labels = padded_labels(batch.targets, images.shape[-2], images.shape[-1])
        return TrainBatch(images, labels, batch.sample_ids)

    def loss(self, engine: Engine, batch: TrainBatch[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Main and auxiliary loss together, and each of them."""
        losses = engine.forward(batch.images, batch.targets)
        total = torch.stack(list(losses.values())).sum()
        return total, {name: loss.detach() for name, loss in losses.items()}

    def evaluator(self, world: World, beat: Callable[[], None]) -> Evaluator:
        """Mean IoU on the validation pictures."""
        return SegmentationEvaluator(self._config, world=world, beat=beat)

    def pictures(self, images: Tensor) -> np.ndarray:
        """The crops with the normalisation undone."""
        return to_bytes(images, self._config.augment.mean, self._config.augment.std)

    def sample_keys(self, sample_ids: Sequence[int]) -> list[str]:
        """File names."""
        return [self._set.pictures[sample].name for sample in sample_ids]


def make_network(config: SegmentConfig, classes: int) -> nn.Module:
    """The segmentor of a configuration."""
    return build.segmentor(
        config.model,
        config.augment,
        config.eval,
        classes=classes,
        grad_checkpointing=config.engine.grad_checkpointing,
    )


def read_scenes(data: ScenesConfig, split: str) -> SceneSet:
    """The pictures and label maps of a split."""
    pictures, labels = data.places(split)  # type: ignore[arg-type]
    return SceneSet.read(pictures, labels, classes=data.classes, zero_is_other=data.zero_is_other)


def names_of(data: ScenesConfig) -> tuple[str, ...]:
    """Names of the classes."""
    return data.names or class_names(Path(data.root) if data.root else None, data.classes)


class SegmentationEvaluator:
    """Mean IoU on the validation set; every rank segments a share."""

    def __init__(self, config: SegmentConfig, *, world: World, beat: Callable[[], None]) -> None:
        self._world, self._beat = world, beat
        self._shown: list[Tensor] = []
        self._set: SceneSet | None = None
        if config.data.root or config.data.val_images:
            self._set = read_scenes(config.data, "validation")

    def run(self, engine: Engine) -> dict[str, float]:
        """``val/mIoU`` and so on with the raw weights, ``val_ema/...`` with the average."""
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

    def _measure(self, model: nn.Module, data: SceneSet, name: str) -> dict[str, float]:
        counts = count_with_ranks(model, data, world=self._world, beat=self._beat, show=self._show)
        return {f"{name}/{key}": value for key, value in counts.figures().items()}

    def _show(self, place: int, picture: Tensor, found: Tensor) -> None:
        if not self._world.main:
            return
        if place == 0:
            self._shown = []
        if self._set is not None and len(self._shown) < _SHOWN:
            self._shown.append(draw_labels(picture, found, self._set.classes))


def count_with_ranks(
    model: nn.Module,
    data: SceneSet,
    *,
    world: World,
    beat: Callable[[], None] = lambda: None,
    show: Callable[[int, Tensor, Tensor], None] | None = None,
) -> PixelCounts:
    """Pixel counts of the whole set, on every rank; arguments as of ``score_with_ranks``."""
    numbers = inference.share_of(len(data), world.rank, world.size)
    counts = PixelCounts(data.classes)
    problem: UserError | None = None
    try:
        seen = iter(range(len(numbers)))
        counts = inference.segment_all(
            model,
            data,
            numbers,
            beat=beat,
            show=None if show is None else lambda _, p, found: show(next(seen), p, found),
        )
        if len(numbers) < -(-len(data) // world.size):
            beat()
    except UserError as error:
        problem = error
    world.raise_on_all_ranks(problem)
    counts.counts = sum(world.gather(counts.counts))
    return counts
