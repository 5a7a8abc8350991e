"""What a run learns, as far as the trainer knows it.

The trainer counts steps, saves, resumes, recovers and reports. Whatever depends on the thing that
is learned (data, network, loss, evaluation) belongs to a `Task`. Image classification
(``classification.py``) is the first one.

A task is made from its configuration; the file's ``task`` key says which (``tasks.py``). It holds
no counters: where the run is comes in as an argument, so that a resumed run sees the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from l2vit.data.order import Split
from l2vit.train.distributed import World
from l2vit.train.engine import Engine

Targets = TypeVar("Targets")


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, as checkpoints record it; a run continues only on equal hashes."""

    classes: tuple[str, ...]
    """Identifier of every output, in order."""
    class_names: tuple[str, ...]
    class_hash: str
    manifest_hash: str
    """Equal for equal samples in equal order."""
    provenance: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    """Where it lies, for messages."""


@dataclass
class TrainBatch(Generic[Targets]):
    """A micro-batch ready for the network, on the device."""

    images: torch.Tensor
    """(B, 3, H, W), normalised; padded to one size where a task has several."""
    targets: Targets
    """What the task's loss compares with."""
    sample_ids: np.ndarray
    """(B,) int64: which sample each image is."""


class Order(Protocol):
    """The global order of the samples, the same for every number of ranks."""

    @property
    def samples(self) -> int:
        """Samples to train on."""

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal orders."""


class Loader(Protocol):
    """Endless micro-batches of one rank, in order."""

    @property
    def order(self) -> Order:
        """The order the batches follow."""

    def __next__(self) -> Any:
        """The next micro-batch, as ``Task.prepare`` takes it."""

    def close(self) -> None:
        """End what works ahead."""


class Evaluator(Protocol):
    """Measures a model during training."""

    def run(self, engine: Engine) -> dict[str, float]:
        """The figures by name, equal on every rank, as ``SET/NAME`` and ``SET_ema/NAME``.

        Draws no random number and leaves the model in training mode.
        """

    def picture(self) -> np.ndarray | None:
        """Answers of the last evaluation drawn on pictures, (H, W, 3) bytes, if there are any."""

    def close(self) -> None:
        """End what works ahead."""


class Report(Protocol):
    """What became of each tensor when a network took its first weights from elsewhere."""

    def summary(self) -> str:
        """A few lines for people."""

    def save(self, directory: Path) -> None:
        """Write it into the run directory."""


class Task(Protocol[Targets]):
    """One thing to learn. Every method is called alike on every rank."""

    data: TrainingData
    batch_multiple: int
    """What must divide a micro-batch: samples that belong together must not span ranks."""
    batch_multiple_key: str
    """The setting that says so, for messages."""
    exact_order: bool
    """False where samples stream in: then an epoch is not each sample once."""
    headline: str
    """The end of the evaluation figures, higher is better, that choose ``checkpoints/best``."""

    def network(self) -> nn.Module:
        """The network with fresh fp32 weights on the CPU, the same for the same ``run.seed``."""

    def initialise(self, network: nn.Module) -> Report | None:
        """Load ``init.source`` into a fresh network; None for a start from scratch."""

    def flops_per_image(self, network: nn.Module) -> float:
        """Of forward and backward together; NaN where they cannot be counted."""

    def warnings(self, network: nn.Module) -> list[str]:
        """What people should know before this network is trained; may be empty."""

    def trial_loss(self, network: nn.Module, images: int, device: torch.device) -> torch.Tensor:
        """Loss of a made-up micro-batch as costly as any: does the step fit into memory?

        ``network`` is a copy on ``device`` in the precision of training.
        """

    def loader(self, split: Split, world: World, *, images_seen: int, directory: Path) -> Loader:
        """This rank's micro-batches from ``images_seen`` on; bad samples are logged in
        ``directory``."""

    def prepare(self, batch: Any, *, steps_left: int) -> TrainBatch[Targets]:
        """What is left to do to a loaded micro-batch, with ``steps_left`` steps until the end."""

    def loss(
        self, engine: Engine, batch: TrainBatch[Targets]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean loss of the micro-batch, and its parts by name (may be empty), on the device.

        Calls ``engine.forward``. Nothing here may wait for the device.
        """

    def evaluator(self, world: World, beat: Callable[[], None]) -> Evaluator:
        """Open the evaluation sets; ``beat`` is called before each batch, as often on any rank."""

    def pictures(self, images: torch.Tensor) -> np.ndarray:
        """(N, H, W, 3) uint8 of images as ``prepare`` returns them, for people."""

    def sample_keys(self, sample_ids: Sequence[int]) -> list[str]:
        """Names by which a person can find the samples."""
