"""Block C: the engine: device and host time of a step, its waits, and mixing alone.

python benchmarks/gpu/c_engine.py
python benchmarks/gpu/c_engine.py --dry-run     # on a CPU
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np
import torch
from measuring import ROOT, Block

from l2vit import config
from l2vit.data import augment_device, mixup
from l2vit.data.augment import AugmentSampler, fill_colour
from l2vit.data.batch import BatchPlan, DecodedBatch, Normalizer
from l2vit.data.order import Split
from l2vit.train import distributed, model
from l2vit.train.config import TrainConfig
from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.precision import DTYPES

RECIPE = ROOT / "pretrain" / "configs" / "in22k_base.yaml"


def settings(block: Block, *overrides: str) -> TrainConfig:
    """The paper's run, or a tiny one."""
    small = ["model.name=l2vit_mini", "data.input_size=32"] if block.dry else []
    return config.load(TrainConfig, str(RECIPE), [*small, *overrides])


def steps(block: Block, world: World, split: Split, *, stage: int, compiled: bool) -> Any:
    """Time of an optimizer step, what of it the host takes, and how often it waits."""
    given = settings(block, f"engine.zero_stage={stage}", f"engine.compile={compiled}")
    classes = 10 if block.dry else 21841
    side = given.data.input_size
    network = model.create(given.model, classes=classes, input_size=side, seed=0)
    engine = Engine(network, given.engine, given.optim, given.ema, world=world, split=split)
    images = torch.randn(split.micro_batch, 3, side, side, device=block.device)
    targets = torch.full((split.micro_batch, classes), 1 / classes, device=block.device)

    def step() -> None:
        for micro_step in range(split.accumulation):
            logits = engine.forward(images)
            engine.backward(-(targets * logits.log_softmax(1)).sum(1).mean())
            if micro_step < split.accumulation - 1:
                engine.micro_step()
        engine.step(lr=1e-4, weight_decay=0.05)

    found: dict[str, Any] = {"split": [split.micro_batch, split.accumulation], "stage": stage}
    try:
        with block.peak(found):
            found["step_ms"] = block.milliseconds(step, rounds=30)
        found["host_ms"] = block.host_milliseconds(step)
        found["waits"] = waits(block, step)
    finally:
        engine.close()
    found["images_per_second"] = 1e3 * split.global_batch / found["step_ms"]
    return found


def waits(block: Block, step: Any) -> list[str]:
    """Where the host waits for the device in one step, as PyTorch's sync debug mode says."""
    if block.device.type == "cpu":
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{warning.filename}:{warning.lineno}" for warning in seen]


def augmentation(block: Block, batch: int) -> dict[str, float]:
    """RandAugment; normalising, erasing and mixing: of one micro-batch, each alone."""
    given = settings(block)
    side, ids = given.data.input_size, np.arange(batch)
    params = AugmentSampler(given.augment, input_size=side, seed=0).sample(0, ids)
    pixels = torch.randint(0, 256, (batch, side, side, 3), device=block.device).to(torch.uint8)
    dtype = DTYPES[given.engine.precision]
    mixer = mixup.Mixer(given.augment, num_classes=1000, seed=0, dtype=dtype)
    normalize = Normalizer(
        mean=given.augment.mean,
        std=given.augment.std,
        device=block.device,
        bytes_only=mixup.kernels_agree(block.device),
    )
    decoded = DecodedBatch(BatchPlan(0, 0, ids, ids), ids, ids % 1000, pixels.clone())
    decoded.draw_erasing(params)
    augment = partial(
        augment_device.apply_ops,
        ops=params.ops,
        arguments=params.arguments,
        fill=fill_colour(given.augment),
        interpolation="bicubic",
    )
    return {
        "randaugment_ms": block.milliseconds(lambda: augment(pixels)),
        "mixing_ms": block.milliseconds(lambda: mixer(normalize(decoded))),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the block."""
    block = Block("c_engine", "The engine's steps.", argv)
    world = distributed.start(distributed.from_environment({}))
    try:
        splits = (Split(2, 2, 1),) if block.dry else (Split(128, 4, 1), Split(256, 2, 1))
        for split in splits:
            for stage in (1, 2):
                for compiled in (False,) if block.dry else (False, True):
                    label = f"{split.micro_batch} x {split.accumulation} ZeRO-{stage}"
                    label += " compiled" if compiled else ""
                    run = partial(steps, block, world, split, stage=stage, compiled=compiled)
                    block.measure(label, run)
        batch = 64 if block.dry else 256
        block.measure("augmentation", lambda: augmentation(block, batch))
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
