"""Forms for CPUs, where a general operator of PyTorch is many times slower than it need be.

The weight gradient of a wide depthwise kernel: oneDNN's fast one stops at three columns; a 7×7
kernel falls to one that is 9 to 50 times slower than the forward pass. So the columns of a wide
kernel get their gradients three at a time, from shifted outputs. The input gradient is the forward
convolution with the kernel turned round, which beats the backward one.

The backward pass of fused attention in bf16: six times as slow as the products that it replaces, so
short sequences (windows) are multiplied out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from l2vit.models.ops.modes import compiling, exporting
from l2vit.models.ops.reference import depthwise_conv as convolve

_FAST_COLUMNS = 3
_MULTIPLIED_OUT = 256  # keys up to which attention is multiplied out


def prefers_columns(x: Tensor, weight: Tensor) -> bool:
    """Whether a backward pass may come to a CPU kernel too wide for the fast weight gradient."""
    return (
        not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and weight.shape[3] > _FAST_COLUMNS
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.is_grad_enabled()
        and not exporting()
        and not torch._C._are_functorch_transforms_active()
    )


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference, with the weight gradient by columns."""
    return _ByColumns.apply(x, weight, bias)


class _ByColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            convolve(grad, weight.flip(2, 3), None) if need_x else None,
            _weight_gradient(x, grad, weight.shape) if need_weight else None,
            grad.sum((0, 2, 3)) if need_bias else None,
        )


def _weight_gradient(x: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """Gradient of the kernel (C, 1, k, k) with k > 3, by convolutions of three columns each."""
    reach = shape[3] // 2

    def three_columns(offset: int) -> Tensor:
        """Gradients of the columns that look ``offset - 1 ... offset + 1`` to the right. Outputs
        shifted out of the picture are lost to the inner one of the three, except at 0."""
        return conv2d_weight(
            x,
            (shape[0], 1, shape[2], _FAST_COLUMNS),
            _shift_columns(grad, offset),
            padding=(shape[2] // 2, 1),
            groups=shape[0],
        )

    columns = [three_columns(0)]
    for offset in range(2, reach + 1, 2):
        outer = min(2, reach - offset + 1)
        columns.insert(0, three_columns(-offset)[..., 2 - outer : 2])
        columns.append(three_columns(offset)[..., 1 : 1 + outer])
    return torch.cat(columns, 3)


def _shift_columns(x: Tensor, by: int) -> Tensor:
    """(B, C, H, W) moved right by ``by`` columns (left if negative), zeros moving in."""
    if by == 0:
        return x
    x = x.permute(0, 2, 3, 1)
    width = x.shape[2]
    kept = max(width - abs(by), 0)
    start = max(-by, 0) if kept else 0
    left = min(max(by, 0), width)
    x = F.pad(x[:, :, start : start + kept], (0, 0, left, width - kept - left))
    return x.permute(0, 3, 1, 2)


def prefers_products(q: Tensor, k: Tensor) -> bool:
    """Whether attention is better multiplied out: short, in bf16, and a backward pass may come."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    return slow and k.shape[-2] <= _MULTIPLIED_OUT and not compiling()
