"""Depthwise convolution on (B, H, W, C): forward, and its gradients, accumulated in fp32.

The input gradient is the forward pass with the kernel turned round. The weight gradient is summed
in parts that a second step adds in a fixed order: no atomics, so a run repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2vit.models.ops.reference import depthwise_conv

_PROGRAMS = 1024  # of the weight gradient: enough to fill a GPU


@triton.jit
def forward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    across: tl.tensor,
    HAS_BIAS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """BLOCK_W pixels of a row, BLOCK_C channels. Grid (B·H·across, channel blocks)."""
    row = (tl.program_id(0) // across).to(tl.int64)
    column = (tl.program_id(0) % across) * BLOCK_W + tl.arange(0, BLOCK_W)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    line = (row % height).to(tl.int32)
    sums = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for i in range(K):
        above = line + i - K // 2
        exists = (above >= 0) & (above < height)
        source = x + (row + i - K // 2) * width * channels
        for j in tl.static_range(K):
            left = column + j - K // 2
            valid = exists & (left >= 0) & (left < width)
            values = tl.load(
                source + left[:, None] * channels + channel[None, :],
                mask=valid[:, None] & inside[None, :],
                other=0.0,
            )
            factor = tl.load(weight + (i * K + j) * channels + channel, mask=inside, other=0.0)
            sums += values.to(tl.float32) * factor.to(tl.float32)[None, :]
    at = row * width * channels + column[:, None] * channels + channel[None, :]
    valid = (column < width)[:, None] & inside[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=valid)


@triton.jit
def weight_gradient_kernel(
    x: tl.tensor,
    grad: tl.tensor,
    part: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    chunk: tl.tensor,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One row of the kernel over ``chunk`` rows of the batch. Grid (chunks, channel blocks, K)."""
    i = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    shift = tl.arange(0, KP)
    sums = tl.zeros((KP, BLOCK_C), tl.float32)
    first = tl.program_id(0).to(tl.int64) * chunk
    for row in range(first, tl.minimum(first + chunk, rows)):
        above = row % height + i - K // 2
        exists = (above >= 0) & (above < height)
        here = grad + row * width * channels
        there = x + (row + i - K // 2) * width * channels
        for begin in range(0, width, BLOCK_W):
            column = begin + tl.arange(0, BLOCK_W)
            upstream = tl.load(
                here + column[:, None] * channels + channel[None, :],
                mask=(column < width)[:, None] & inside[None, :] & exists,
                other=0.0,
            ).to(tl.float32)
            left = column[None, :] + shift[:, None] - K // 2
            valid = exists & (left >= 0) & (left < width)
            values = tl.load(
                there + left[:, :, None] * channels + channel[None, None, :],
                mask=valid[:, :, None] & inside[None, None, :],
                other=0.0,
            ).to(tl.float32)
            sums += tl.sum(values * upstream[None, :, :], 1)
    at = (tl.program_id(0).to(tl.int64) * K + i) * KP * channels
    at += shift[:, None] * channels + channel[None, :]
    tl.store(part + at, sums, mask=(shift < KP)[:, None] & inside[None, :])


def _blocks(width: int, channels: int) -> tuple[int, int]:
    """Pixels and channels of a tile, powers of two that fit the map."""
    return min(16, triton.next_power_of_2(width)), min(64, triton.next_power_of_2(channels))


def _forward(x: Tensor, taps: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """``taps`` is the kernel as (k·k, C)."""
    x = x.contiguous()
    b, h, w, c = x.shape
    block_w, block_c = _blocks(w, c)
    across = triton.cdiv(w, block_w)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # where Triton launches
        forward_kernel[(b * h * across, triton.cdiv(c, block_c))](
            x,
            taps,
            x if bias is None else bias.contiguous(),
            out,
            h,
            w,
            c,
            across,
            HAS_BIAS=bias is not None,
            K=size,
            BLOCK_W=block_w,
            BLOCK_C=block_c,
        )
    return out


@torch.library.custom_op("l2vit::depthwise", mutates_args=())
def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Correlate (B, H, W, C) with (C, 1, k, k), k odd, zero padding; the same shape, contiguous."""
    taps = weight.flatten(1).t().contiguous()
    return _forward(x, taps, bias, weight.shape[3])


@depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("l2vit::depthwise_backward", mutates_args=())
def depthwise_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, of the kernel (C, 1, k, k) and of the bias, the last two in fp32."""
    x, grad = x.contiguous(), grad.contiguous()
    b, h, w, c = x.shape
    size = weight.shape[3]
    grad_x = _forward(grad, weight.flatten(1).t().flip(0).contiguous(), None, size)
    block_w, block_c = min(8, triton.next_power_of_2(w)), min(32, triton.next_power_of_2(c))
    padded, groups = triton.next_power_of_2(size), triton.cdiv(c, block_c)
    chunk = triton.cdiv(b * h, max(1, _PROGRAMS // (groups * size)))
    chunks = triton.cdiv(b * h, chunk)
    part = x.new_empty(chunks, size, padded, c, dtype=torch.float32)
    with torch.cuda.device_of(x):  # where Triton launches
        weight_gradient_kernel[(chunks, groups, size)](
            x,
            grad,
            part,
            b * h,
            h,
            w,
            c,
            chunk,
            K=size,
            KP=padded,
            BLOCK_W=block_w,
            BLOCK_C=block_c,
        )
    grad_weight = part.sum(0)[:, :size].permute(2, 0, 1).reshape(weight.shape).contiguous()
    return grad_x, grad_weight, grad.sum((0, 1, 2), dtype=torch.float32)


@depthwise_backward.register_fake
def _(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def like(t: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)

    wide = torch.float32
    return like(x, x.dtype), like(weight, wide), weight.new_empty(weight.shape[0], dtype=wide)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = torch.ops.l2vit.depthwise_backward(x, weight, grad)
    bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_weight.to(weight.dtype), bias


depthwise.register_autograd(_backward, setup_context=_keep)


def check(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of a tiny input by the kernels and by PyTorch, for 3×3 and 7×7."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for size in (3, 7):
        given = [(2, 5, 9, 40), (40, 1, size, size), (40,)]
        inputs = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in given]
        upstream = torch.randn(given[0], device=device, dtype=dtype)
        x, weight, bias = inputs
        by_torch = depthwise_conv(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
        ways = (torch.ops.l2vit.depthwise(x, weight, bias), by_torch)
        for kept, out in zip(found, ways, strict=True):
            kept += [out.detach(), *torch.autograd.grad(out, inputs, upstream)]
    return found
