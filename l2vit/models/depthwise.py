"""Depthwise convolution on (B, H, W, C) feature maps, fast forward and backward.

On CPUs oneDNN's fast weight gradient of a depthwise convolution stops at three columns; a 7×7
kernel falls to one that is 9 to 50 times slower than the forward pass. So the columns of a wide
kernel get their gradients three at a time, from shifted outputs. The input gradient is the
forward convolution with the kernel turned round, which beats the backward one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from l2vit.models import kernels
from l2vit.models.dense import fusible, hooked
from l2vit.models.tracing import eager, exporting

_FAST_COLUMNS = 3


class DepthwiseConv(nn.Conv2d):
    """Depthwise k×k convolution, stride 1, same padding, with bias; (B, H, W, C) to the same."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        return depthwise(input, self.weight, self.bias)

    def with_gelu(self, x: Tensor) -> Tensor:
        """GELU of the layer's output."""
        if torch.is_grad_enabled() or hooked(self) or not fusible(x, self.weight, self.bias):
            return F.gelu(self(x))
        padding, ones = [side // 2 for side in self.weight.shape[2:]], [1, 1]
        y = torch.ops.mkldnn._convolution_pointwise(
            x.permute(0, 3, 1, 2),
            self.weight,
            self.bias,
            padding,
            ones,
            ones,
            self.groups,
            "gelu",
            [],
            "none",
        )
        return y.permute(0, 2, 3, 1)

    def with_input(self, x: Tensor) -> Tensor:
        """The layer's output plus its input; in full precision on CPUs one in the middle of the
        kernel adds it (beside 1, bf16 would round the kernel away)."""
        exact = x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64)
        plain = hooked(self) or not eager() or torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or not exact or plain:
            return x + self(x)
        height, width = (side // 2 for side in self.weight.shape[2:])
        middle = F.pad(self.weight.new_ones(1, 1, 1, 1), (width, width, height, height))
        return depthwise(x, self.weight + middle, self.bias)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Correlate each channel of ``x`` (B, H, W, C) with its kernel, zero padding, same size.

    Args:
        weight: (C, 1, k, k) with k odd.
        bias: (C,) or None.
    """
    fused = kernels.chosen("depthwise", x)
    if fused or _by_columns(x, weight):
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        call = torch.ops.l2vit.depthwise if fused else _ByColumns.apply
        return call(x, weight, bias)
    return convolve(x, weight, bias)


def _by_columns(x: Tensor, weight: Tensor) -> bool:
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


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`depthwise` by PyTorch's convolution; same arguments."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1)


class _ByColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            convolve(grad, weight.flip(2, 3), None) if need_x else None,
            _weight_gradient(x, grad, weight.shape) if need_weight else None,
            grad.sum((0, 1, 2)) if need_bias else None,
        )


def _weight_gradient(x: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """Gradient of the kernel (C, 1, k, k) with k > 3, by convolutions of three columns each."""
    reach = shape[3] // 2

    def three_columns(offset: int) -> Tensor:
        """Gradients of the columns that look ``offset - 1 ... offset + 1`` to the right. Outputs
        shifted out of the picture are lost to the inner one of the three, except at 0."""
        return conv2d_weight(
            x.permute(0, 3, 1, 2),
            (shape[0], 1, shape[2], _FAST_COLUMNS),
            _shift_columns(grad, offset).permute(0, 3, 1, 2),
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
    """(B, H, W, C) moved right by ``by`` columns (left if negative), zeros moving in."""
    if by == 0:
        return x
    width = x.shape[2]
    kept = max(width - abs(by), 0)
    start = max(-by, 0) if kept else 0
    left = min(max(by, 0), width)
    return F.pad(x[:, :, start : start + kept], (0, 0, left, width - kept - left))
