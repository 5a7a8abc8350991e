"""The parts of a training step, each recorded by itself: model, engine, augmentation."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from l2vit.data import augment_device
from l2vit.data.augment import AugmentSampler, fill_colour
from l2vit.data.batch import BatchPlan, DecodedBatch, Normalizer
from l2vit.data.mixup import Mixer
from l2vit.data.order import Split
from l2vit.plan.kinds import COPIES
from l2vit.plan.recorder import Operation, Recorder, kernels_recorded
from l2vit.plan.trace import Trace, trace
from l2vit.train import model
from l2vit.train.config import TrainConfig
from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.precision import DTYPES

META = torch.device("meta")


def model_part(config: TrainConfig, *, batch: int, classes: int) -> Trace:
    """Forward and backward pass and loss of one micro-batch, on the meta device."""
    return trace(
        lambda: model.from_config(config, classes=classes),
        batch=batch,
        input_size=config.data.input_size,
        classes=classes,
        dtype=DTYPES[config.engine.precision],
    )


def engine_part(config: TrainConfig, *, classes: int, world: World) -> Counter[Operation]:
    """What DeepSpeed and the optimizer do in one step, on the CPU with the model's real sizes.

    The model's own work is replaced by one operator that gives every weight a gradient. The
    process group is up; the engine's state must fit into memory.
    """
    whole = model.from_config(config, classes=classes)
    recorder = Recorder()
    with _fused_optimizer():
        engine = Engine(
            _OnlyGradients(whole, recorder),
            config.engine,
            config.optim,
            config.ema,
            world=world,
            split=Split(1, 1, 1),
        )
    try:
        for last in (False, True):  # the first step makes what the others use again
            recorder.operations.clear()
            with recorder if last else contextlib.nullcontext():
                engine.backward(engine.forward(torch.zeros(1, 1, 1, 1)).sum())
                engine.step(lr=1e-3, weight_decay=0.05)
    finally:
        engine.close()
    return _as_communication(recorder.operations)


def _as_communication(operations: Counter[Operation]) -> Counter[Operation]:
    """The engine copies only to pack its buckets: part of the all-reduce, not of the model."""
    renamed: Counter[Operation] = Counter()
    for operation, count in operations.items():
        if operation.kind == COPIES:
            operation = Operation(operation.name, "all-reduce", bytes=operation.bytes)
        renamed[operation] += count
    return renamed


class _OnlyGradients(nn.Module):
    """A model's parameters without its work."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.model, self._recorder = model, recorder

    def forward(self, images: Tensor) -> Tensor:
        return _GiveGradients.apply(images, self._recorder, *self.model.parameters())  # type: ignore[no-any-return]


class _GiveGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, recorder: Recorder, *parameters: Tensor) -> Tensor:
        ctx.parameters, ctx.recorder = parameters, recorder
        with recorder.uncounted():
            return images.new_ones(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.recorder.uncounted():
            return (None, None, *[torch.ones_like(p) for p in ctx.parameters])


@contextlib.contextmanager
def _fused_optimizer() -> Iterator[None]:
    """The optimizer as GPUs run it: one operator for all weights of a group."""

    class Fused(torch.optim.AdamW):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "fused": True})

    with mock.patch.object(torch.optim, "AdamW", Fused):
        yield


def augmentation_parts(
    config: TrainConfig, *, batch: int, classes: int
) -> dict[str, Counter[Operation]]:
    """RandAugment; normalising, erasing and mixing: of one micro-batch, on the meta device."""
    augment, size = config.augment, config.data.input_size
    ids = np.arange(batch)
    params = AugmentSampler(augment, input_size=size, seed=config.run.seed).sample(0, ids)
    pixels = torch.empty(batch, size, size, 3, dtype=torch.uint8, device=META)
    parts: dict[str, Counter[Operation]] = {}
    with _recorded(parts, "RandAugment"):
        pixels = augment_device.apply_ops(
            pixels,
            params.ops,
            params.arguments,
            fill=fill_colour(augment),
            interpolation="bicubic",
        )
    decoded = DecodedBatch(BatchPlan(0, 0, ids, ids), ids, ids % classes, pixels)
    decoded.draw_erasing(params)
    normalize = Normalizer(mean=augment.mean, std=augment.std, device=META, bytes_only=True)
    dtype = DTYPES[config.engine.precision]
    mixer = Mixer(augment, num_classes=classes, seed=config.run.seed, dtype=dtype)
    with _recorded(parts, "normalise, erase, mix"):
        mixer(normalize(decoded))
    return parts


@contextlib.contextmanager
def _recorded(parts: dict[str, Counter[Operation]], name: str) -> Iterator[None]:
    recorder = Recorder()
    agree = mock.patch.object(augment_device, "kernels_agree", lambda device: True)
    with kernels_recorded(recorder), agree, recorder:
        yield
    parts[name] = recorder.operations
