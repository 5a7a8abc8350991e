"""Block B: whole training steps of l2vit_base and its peers: images/s, MFU, memory, profile.

A step is forward, loss over 21,841 classes, backward, fused AdamW, with drop path 0.2 in bf16.

    python benchmarks/gpu/b_model.py
    python benchmarks/gpu/b_model.py --dry-run     # on a CPU
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from measuring import Block, peak_tflops
from torch.profiler import ProfilerActivity, profile

import l2vit  # noqa: F401  registers our models
from l2vit.models import ops
from l2vit.models.count import count_macs

CLASSES = 21841
PEERS = ("swin_base_patch4_window7_224", "vit_base_patch16_224")


def training_step(block: Block, name: str, batch: int, *, compiled: bool) -> Callable[[], None]:
    """A function that carries out one whole step."""
    classes, side = (10, 32) if block.dry else (CLASSES, 224)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, drop_path_rate=0.2).train()
    model = model.to(block.device, block.dtype, memory_format=torch.channels_last)
    call = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, side, side, device=block.device, dtype=block.dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.full((batch, classes), 1 / classes, device=block.device)

    def step() -> None:
        loss = -(targets * F.log_softmax(call(images).float(), dim=1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def whole(
    block: Block, name: str, batch: int, *, compiled: bool, kernels: bool = True
) -> dict[str, Any]:
    """Images a second and the share of the peak that the model's own operations are."""
    found: dict[str, Any] = {"batch": batch}
    try:
        with ops.use_triton(kernels), block.peak(found):
            step = training_step(block, name, batch, compiled=compiled)
            taken = block.milliseconds(step, rounds=15)
            found["host_ms"] = block.host_milliseconds(step)
    finally:
        torch.compiler.reset()
        gc.collect()
    rate = 1e3 * batch / taken
    macs = 1.0 if block.dry else count_macs(timm.create_model(name))
    found |= {"ms": taken, "images_per_second": rate}
    return found | {"mfu": 6 * macs * rate / (peak_tflops() * 1e12)}


def profiled(block: Block, name: str, batch: int, *, compiled: bool) -> list[dict[str, Any]]:
    """The forty kernels that take longest in a step."""
    step = training_step(block, name, batch, compiled=compiled)
    for _ in range(1 if block.dry else 5):
        step()
    kinds = [ProfilerActivity.CPU] if block.dry else [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    with profile(activities=kinds) as books:
        step()
        block.synchronize()
    rows = [
        {"name": event.key[:100], "calls": event.count, "ms": _own_time(block, event) / 1e3}
        for event in books.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:40]


def _own_time(block: Block, event: Any) -> float:
    return event.self_cpu_time_total if block.dry else event.self_device_time_total


def main(argv: list[str] | None = None) -> None:
    """Run the block."""
    block = Block("b_model", "Whole training steps.", argv)
    name, batches, peers = "l2vit_base", (128, 256, 64), PEERS
    if block.dry:
        name, batches, peers = "l2vit_mini", (2,), PEERS[:0]
    for batch in batches:
        for compiled in (False,) if block.dry else (False, True):
            for kernels in (True, False):
                label = f"{name} {batch} {'compiled' if compiled else 'eager'}"
                label += "" if kernels else " without our kernels"
                run = partial(whole, block, name, batch, compiled=compiled, kernels=kernels)
                block.measure(label, run)
        for peer in peers:
            run = partial(whole, block, peer, batch, compiled=True)
            block.measure(f"{peer} {batch} compiled", run)
    run_profile = partial(profiled, block, name, batches[0], compiled=not block.dry)
    block.measure("profile", run_profile)


if __name__ == "__main__":
    main()
