"""One training micro-batch without a device: every operation's cost and every byte kept.

The model runs forward and backward on the meta device, where tensors have shapes and no data. A
dispatch mode sees each operation, so arithmetic and memory traffic are the model's own, not a
formula's, and storages are followed from allocation to release, which gives the peak.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2vit.models.ops import gpu
from l2vit.plan.devices import Device
from l2vit.plan.recorder import Operation, Recorder, kernels_recorded, size_of


@dataclass(frozen=True)
class Trace:
    """Forward and backward of one micro-batch."""

    operations: Counter[Operation]
    parameters: int
    tensors: int
    """Trainable parameters by number, not by size."""
    kept_bytes: int
    """What the forward pass keeps for the backward pass."""
    peak_bytes: int
    """Most bytes alive at once beside the weights; gradients are not counted."""
    low_precision: bool

    @property
    def flops(self) -> float:
        """Floating-point operations, two to a multiply-add."""
        return sum(op.flops * count for op, count in self.operations.items())

    def seconds(self, device: Device) -> float:
        """Time on ``device``, of the device or of the host that launches, whichever is longer."""
        return device.seconds(self.operations, low_precision=self.low_precision)


def trace(
    make: Callable[[], nn.Module],
    *,
    batch: int,
    input_size: int,
    classes: int,
    dtype: torch.dtype,
    backward: bool = True,
    on_gpu: bool = True,
) -> Trace:
    """Run ``make()`` on the meta device.

    Args:
        make: builds the model (in training mode).
        batch: images in the micro-batch.
        input_size: their height and width.
        classes: columns of the logits.
        dtype: of weights and activations; the loss is computed in fp32.
        backward: False traces an evaluation step instead.
        on_gpu: count the kernels that a GPU would run instead of PyTorch's general operators.
    """
    with torch.device("meta"):
        model = make().to(dtype).train(backward)
        images = torch.empty(batch, 3, input_size, input_size, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        targets = torch.empty(batch, classes)
    gradients: list[Tensor] = []
    recorder = Recorder([*model.parameters(), *model.buffers()])
    recorder.follow(images, targets)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(backward))
        stack.enter_context(_fused_attention(recorder))
        if on_gpu:
            stack.enter_context(_as_on_a_gpu(recorder))
        stack.enter_context(recorder)
        logits = model(images).float()
        if backward:
            loss = -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()
            kept = recorder.alive
            stack.enter_context(_gradients_taken(model, recorder, gradients))
            loss.backward()
        else:
            kept = recorder.alive
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    low = dtype != torch.float32
    return Trace(recorder.operations, sum(sizes), len(sizes), kept, recorder.peak, low)


@contextlib.contextmanager
def _gradients_taken(
    model: nn.Module, recorder: Recorder, gradients: list[Tensor]
) -> Iterator[None]:
    """Take each weight's gradient out of the count: ZeRO's formulas speak of gradients."""

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        recorder.discount(parameter.grad)
        gradients.append(parameter.grad)
        parameter.grad = None

    handles = [
        p.register_post_accumulate_grad_hook(take) for p in model.parameters() if p.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _as_on_a_gpu(recorder: Recorder) -> Iterator[None]:
    """Inside, meta tensors take the kernels that a GPU's would."""
    autocast = torch.is_autocast_enabled

    def autocast_enabled(kind: str = "cuda") -> bool:
        return kind != "meta" and autocast(kind)

    with (
        kernels_recorded(recorder),
        mock.patch.object(torch, "is_autocast_enabled", autocast_enabled),
        mock.patch.object(gpu, "may_run", _has_kernel),
    ):
        yield


def _has_kernel(kernel: str, x: Tensor) -> bool:
    __import__(f"l2vit.models.ops.triton_{kernel}")
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def _fused_attention(recorder: Recorder) -> Iterator[None]:
    """Puts what a fused attention kernel keeps and costs in the place of the plain form.

    The meta device has only the plain form, which keeps the whole attention matrix; devices have
    kernels that keep queries, keys, values, output and one number a row.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return cast(Tensor, _Attention.apply(q, k, v, recorder))

    # Patched and not a function mode: those are off while gradient checkpointing recomputes.
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, recorder: Recorder) -> Tensor:
        rows, width = q.numel() // q.shape[-1], q.shape[-1]
        ctx.flops = 4.0 * rows * k.shape[-2] * width
        ctx.recorder = recorder
        with recorder.uncounted():
            output = torch.empty_like(q)
            ctx.save_for_backward(q, k, v, output, torch.empty(rows, device=q.device))
        recorder.add(_attention("forward", ctx.flops, q, k, v, output))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, output, _ = ctx.saved_tensors
        with ctx.recorder.uncounted():
            grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        ctx.recorder.add(_attention("backward", 2.5 * ctx.flops, q, k, v, output, grad, *grads))
        return (*grads, None)


def _attention(direction: str, flops: float, *tensors: Tensor) -> Operation:
    name = f"scaled_dot_product_attention {direction}"
    return Operation(name, "softmax attention", "matmul", flops, sum(map(size_of, tensors)))
