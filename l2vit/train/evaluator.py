"""Evaluation during training: every set, raw weights and average, training undisturbed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from l2vit.data.manifest import Manifest
from l2vit.errors import ConfigError
from l2vit.train.config import TrainConfig
from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.evaluate import Tally, evaluate


@dataclass
class _Set:
    name: str
    loader: Any
    columns: torch.Tensor | None
    """Which logits are this set's classes; None if they are the training classes."""


class Evaluator:
    """The evaluation sets of a run: ``data.val`` under the name val, and ``eval.extra``."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        *,
        world: World,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the sets; ``beat`` is called before each batch, as often on every rank."""
        self._world, self._beat = world, beat
        self._sets: list[_Set] = []
        if config.data.val:
            self._add(config, manifest, "val", config.data.val, 0, 0.0)
        for name, extra in config.eval.extra.items():
            self._add(config, manifest, name, extra.data, extra.input_size, extra.crop_fraction)

    def run(self, engine: Engine) -> dict[str, float]:
        """Measure every set with the raw weights and, where there is one, with the average.

        BatchNorm statistics become the mean over ranks first. No random number is drawn.

        Returns:
            ``SET/top1_percent``, ``SET/top5_percent``, ``SET/loss``; with the average
            ``SET_ema/...``.
        """
        if not self._sets:
            return {}
        engine.average_buffers()
        engine.module.eval()
        values = self._measure(engine, "")
        if engine.ema is not None:
            with engine.averaged_weights():
                values |= self._measure(engine, "_ema")
        engine.module.train()
        return values

    def close(self) -> None:
        """Release the loaders."""
        for each in self._sets:
            close = getattr(each.loader, "close", None)
            if close is not None:
                close()

    def _measure(self, engine: Engine, suffix: str) -> dict[str, float]:
        values = {}
        for each in self._sets:
            forward = self._beating(_restricted(engine.infer, each.columns))
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

    def _add(
        self, config: TrainConfig, manifest: Manifest, name: str, path: str, size: int, crop: float
    ) -> None:
        from l2vit.data.loaders import eval_loader

        loader = eval_loader(
            Path(path),
            backend=config.data.backend,
            input_size=size or config.data.input_size,
            crop_fraction=crop or config.eval.crop_fraction,
            crop_mode=config.eval.crop_mode,
            mean=config.augment.mean,
            std=config.augment.std,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
            rank=self._world.rank,
            world=self._world.size,
            batch=config.eval.batch,
            device=self._world.device,
            hw_decoder_load=config.data.hw_decoder_load,
        )
        columns = class_columns(manifest.classes, loader.manifest.classes, name)
        if columns is not None:
            columns = columns.to(self._world.device)
        self._sets.append(_Set(name, loader, columns))


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


def _restricted(
    forward: Callable[[torch.Tensor], torch.Tensor], columns: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    if columns is None:
        return forward

    def restricted(images: torch.Tensor) -> torch.Tensor:
        logits = forward(images)[:, columns.clamp(min=0)]
        return logits.masked_fill(columns < 0, torch.finfo(logits.dtype).min)

    return restricted
