"""Image classification as a `Task`: shards, mixed images, soft targets, top-1 accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from l2vit.data.bad_samples import LOG_NAME
from l2vit.data.batch import Batch
from l2vit.data.config import AugmentConfig
from l2vit.data.contact_sheet import to_bytes
from l2vit.data.manifest import Manifest
from l2vit.data.order import Split, mix_group
from l2vit.errors import ConfigError
from l2vit.models.padding import fitting_windows, padding_warnings
from l2vit.train import distributed, model
from l2vit.train.config import TrainConfig
from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.evaluation import Evaluator
from l2vit.train.precision import DTYPES
from l2vit.train.probe import fix_body
from l2vit.train.schedule import steps_of
from l2vit.train.task import Loader, Report, TrainBatch, TrainingData


def mix_off_steps(augment: AugmentConfig, *, steps_per_epoch: int) -> int:
    """How many of the run's last steps neither mixup nor cutmix takes part in."""
    text = f"{augment.mix_off_epochs} epochs"
    return steps_of(text, "augment.mix_off_epochs", steps_per_epoch, global_batch=1)


class Classification:
    """Learns to classify the images of ``data.train``.

    Raises:
        ConfigError: ``data.train`` is not set.
        UserError: it holds no finished shards.
    """

    headline = "/top1_percent"
    batch_multiple_key = "augment.mix_group"

    def __init__(self, config: TrainConfig) -> None:
        if not config.data.train:
            raise ConfigError("data.train is required: the directory of shards to train on")
        self._config = config
        self._manifest = manifest = Manifest.of_training(
            config.data, check=distributed.from_environment().local_rank == 0
        )
        self.data = TrainingData(
            classes=manifest.classes,
            class_names=manifest.class_names,
            class_hash=manifest.class_hash,
            manifest_hash=manifest.hash,
            provenance={"dataset": manifest.dataset, **manifest.provenance},
            where=config.data.train,
        )
        self.batch_multiple = mix_group(config.augment)
        self.exact_order = not config.data.stream
        self._mix_off_steps = 0

    def network(self) -> nn.Module:
        """The timm model that ``model`` describes; refuses sizes it cannot be evaluated at."""
        config, size = self._config, self._config.data.input_size
        network = model.from_config(config, classes=len(self.data.classes))
        model.check_evaluation_sizes(network, config.eval, name=config.model.name, input_size=size)
        if config.optim.train == "head":
            fix_body(network)
        return network

    def initialise(self, network: nn.Module) -> Report | None:
        """Load ``init.source``, the classifier's rows by class identifier."""
        if not self._config.init.source:
            return None
        from l2vit.train.transfer import load_initial

        classes, names = self.data.classes, self.data.class_names
        return load_initial(network, self._config.init, classes=classes, class_names=names)

    def flops_per_image(self, network: nn.Module) -> float:
        """Six times the multiply-adds at the training resolution."""
        from l2vit.models.count import count_macs

        try:
            return 6 * count_macs(network, self._config.data.input_size)
        except (RuntimeError, NotImplementedError):  # the meta device cannot run the model
            return math.nan

    def warnings(self, network: nn.Module) -> list[str]:
        """Windows that do not divide the feature maps of the training resolution."""
        size = self._config.data.input_size
        try:
            warnings = padding_warnings(network, size)
            if warnings and hasattr(network, "set_input_size"):
                fitting = ", ".join(map(str, fitting_windows(network, size))) or "none"
                warnings.append(f"windows without padding at {size}: {fitting}")
        except (RuntimeError, NotImplementedError):  # the meta device cannot run the model
            return []
        return warnings

    def trial_loss(self, network: nn.Module, images: int, device: torch.device) -> torch.Tensor:
        """Cross-entropy of black images against uniform targets."""
        size, dtype = self._config.data.input_size, next(network.parameters()).dtype
        black = torch.zeros(images, 3, size, size, dtype=dtype, device=device)
        logits = network(black.contiguous(memory_format=torch.channels_last)).float()
        return F.cross_entropy(logits, torch.full_like(logits, 1 / logits.shape[1]))

    def loader(self, split: Split, world: World, *, images_seen: int, directory: Path) -> Loader:
        """Augmented images of ``data.train``."""
        from l2vit.data.loader import train_loader
        from l2vit.data.mixup import Mixer

        config = self._config
        loader = train_loader(
            config.data,
            config.augment,
            manifest=self._manifest,
            split=split,
            rank=world.rank,
            seed=config.run.seed,
            device=world.device,
            draws=config.run.draws,
            images_seen=images_seen,
            bad_samples_log=directory / LOG_NAME,
        )
        self._mixer = Mixer(
            config.augment,
            num_classes=len(self.data.classes),
            seed=config.run.seed,
            dtype=DTYPES[config.engine.precision],
        )
        self._mix_off_steps = mix_off_steps(
            config.augment, steps_per_epoch=loader.order.steps_per_epoch
        )
        return loader

    def prepare(self, batch: Batch, *, steps_left: int) -> TrainBatch[torch.Tensor]:
        """Mix images and labels; the targets are (B, classes) probabilities."""
        images, targets = self._mixer(batch, mix=steps_left > self._mix_off_steps)
        return TrainBatch(images, targets, batch.sample_ids)

    def loss(
        self, engine: Engine, batch: TrainBatch[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Cross-entropy with soft targets."""
        logits = engine.forward(batch.images)
        return -(batch.targets * F.log_softmax(logits, dim=1)).sum(1).mean(), {}

    def evaluator(self, world: World, beat: Callable[[], None]) -> Evaluator:
        """``data.val`` and the sets of ``eval.extra``."""
        config = self._config
        return Evaluator(
            config.data, config.eval, config.augment, self.data.classes, world=world, beat=beat
        )

    def pictures(self, images: torch.Tensor) -> np.ndarray:
        """The images with the normalisation undone."""
        return to_bytes(images, self._config.augment.mean, self._config.augment.std)

    def sample_keys(self, sample_ids: Sequence[int]) -> list[str]:
        """The keys of samples, as ``bad_samples.jsonl`` names them."""
        from l2vit.data.loader import open_reader

        data = self._config.data
        reader = open_reader(data, data.train, self._manifest)
        return [reader.key_of(sample) for sample in sample_ids]
