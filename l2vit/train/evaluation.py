"""Evaluation: every image counted once, whatever the number of ranks, training undisturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from l2vit.data.batch import Batch
from l2vit.data.config import AugmentConfig, DataConfig, EvalConfig, EvalSetConfig
from l2vit.errors import ConfigError
from l2vit.train.distributed import World
from l2vit.train.engine import Engine

Observer = Callable[[torch.Tensor, torch.Tensor, np.ndarray], None]
"""Called with logits (B, classes), labels (B,) and sample ids (B,) of each batch of this rank."""


@dataclass(frozen=True)
class Tally:
    """Sums over an evaluation set."""

    count: int
    top1: int
    """Images whose label has the highest logit."""
    top5: int
    loss: float
    """Cross-entropy summed over the images, in nats."""

    @property
    def top1_percent(self) -> float:
        return 100 * self.top1 / max(self.count, 1)

    @property
    def top5_percent(self) -> float:
        return 100 * self.top5 / max(self.count, 1)

    @property
    def mean_loss(self) -> float:
        return self.loss / max(self.count, 1)


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    loader: Iterable[Batch],
    *,
    world: Any,
    observe: Observer | None = None,
) -> Tally:
    """Run ``forward`` over ``loader`` and sum over all ranks.

    A rank whose batch is empty computes one blank image all the same: under ZeRO-3 every rank
    must take part in gathering the weights.

    Args:
        forward: images (B, 3, H, W) to logits (B, classes), in evaluation mode.
        loader: this rank's share; the same number of batches on every rank.
        world: a ``World`` (``sum`` is used).
        observe: sees each batch's outcome on its own rank.
    """
    sums: torch.Tensor | None = None
    count = 0
    for batch in loader:
        if not len(batch):
            forward(batch.images.new_zeros((1, *batch.images.shape[1:])))
            continue
        logits = forward(batch.images).float()
        count += len(batch)
        outcome = _sums(logits, batch.labels)
        sums = outcome if sums is None else sums + outcome
        if observe is not None:
            observe(logits, batch.labels, batch.sample_ids)
    own = [0.0, 0.0, 0.0] if sums is None else sums.tolist()
    total, top1, top5, loss = world.sum([count, *own])
    return Tally(int(total), int(top1), int(top5), loss)


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """float64 (top-1 hits, top-5 hits, summed loss), still on the device."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    return torch.stack([hits[:, 0].double().sum(), hits.double().sum(), loss])


@dataclass
class _Set:
    name: str
    loader: Any
    columns: torch.Tensor | None
    """Which logits are this set's classes; None if they are the training classes."""


def raw_and_average(engine: Engine, measure: Callable[[str], dict[str, float]]) -> dict[str, float]:
    """Figures of the raw weights and, where there is one, of the average; training undisturbed.

    BatchNorm statistics become the mean over ranks first.

    Args:
        engine: holds both; its module is in eval mode inside and in training mode afterwards.
        measure: takes what the names of sets end in, ``""`` or ``"_ema"``; gives figures by name.
    """
    engine.average_buffers()
    engine.module.eval()
    values = measure("")
    if engine.ema is not None:
        with engine.averaged_weights():
            values |= measure("_ema")
    engine.module.train()
    return values


class Evaluator:
    """The evaluation sets of a run: ``data.val`` under the name val, and ``eval.extra``."""

    def __init__(
        self,
        data: DataConfig,
        evaluation: EvalConfig,
        augment: AugmentConfig,
        classes: tuple[str, ...],
        *,
        world: World,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the sets.

        Args:
            data: ``val`` and what reads it.
            evaluation: crops, batch and further sets.
            augment: mean and standard deviation of the channels.
            classes: identifiers of the network's outputs, in order.
            world: this rank's place.
            beat: called before each batch, as often on every rank.
        """
        from l2vit.data.loader import eval_loader

        self._world, self._beat = world, beat
        self._sets: list[_Set] = []
        named = {"val": EvalSetConfig(data.val)} if data.val else {}
        for name, dataset in {**named, **evaluation.extra}.items():
            loader = eval_loader(
                dataset,
                data,
                evaluation,
                augment,
                rank=world.rank,
                world=world.size,
                device=world.device,
            )
            columns = class_columns(classes, loader.manifest.classes, name)
            if columns is not None:
                columns = columns.to(world.device)
            self._sets.append(_Set(name, loader, columns))

    def run(self, engine: Engine) -> dict[str, float]:
        """Measure every set with the raw weights and, where there is one, with the average.

        BatchNorm statistics become the mean over ranks first. No random number is drawn.

        Returns:
            ``SET/top1_percent``, ``SET/top5_percent``, ``SET/loss``; with the average
            ``SET_ema/...``.
        """
        if not self._sets:
            return {}
        return raw_and_average(engine, lambda suffix: self._measure(engine, suffix))

    def picture(self) -> None:
        """Nothing to draw: an answer is a class."""

    def close(self) -> None:
        """Release the loaders."""
        for each in self._sets:
            close = getattr(each.loader, "close", None)
            if close is not None:
                close()

    def _measure(self, engine: Engine, suffix: str) -> dict[str, float]:
        values = {}
        for each in self._sets:
            forward = self._beating(restricted(engine.infer, each.columns))
            tally: Tally = evaluate(forward, each.loader, world=self._world)
            name = each.name + suffix
            values[f"{name}/top1_percent"] = tally.top1_percent
            values[f"{name}/top5_percent"] = tally.top5_percent
            values[f"{name}/loss"] = tally.mean_loss
        return values

    def _beating(
        self, forward: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def beating(images: torch.Tensor) -> torch.Tensor:
            self._beat()
            return forward(images)

        return beating


def class_columns(
    trained: tuple[str, ...], evaluated: tuple[str, ...], name: str
) -> torch.Tensor | None:
    """(classes of the set,) int64: the head's row of each class, -1 for classes it lacks.

    None if both class lists are the same.

    Raises:
        ConfigError: no class in common; names the set.
    """
    if trained == evaluated:
        return None
    rows = {wnid: row for row, wnid in enumerate(trained)}
    columns = torch.tensor([rows.get(wnid, -1) for wnid in evaluated])
    if bool((columns < 0).all()):
        raise ConfigError(f"evaluation set {name} has no class in common with the training data")
    return columns


def restricted(
    forward: Callable[[torch.Tensor], torch.Tensor], columns: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``forward`` with its logits reduced to ``columns`` (see :func:`class_columns`).

    Classes the model lacks get the lowest value there is: they are never the answer.
    """
    if columns is None:
        return forward

    def chosen(images: torch.Tensor) -> torch.Tensor:
        logits = forward(images)[:, columns.clamp(min=0)]
        return logits.masked_fill(columns < 0, torch.finfo(logits.dtype).min)

    return chosen
