"""Depthwise convolution on (B, H, W, C): forward, and its gradients, accumulated in fp32.

With a residual, x + conv(x), the kernel's centre is one more: then the forward pass and the input
gradient add x and the incoming gradient for nothing.

The forward pass slides down the rows: a program keeps the sums of the K output rows that an input
row touches, so each input is read and converted K times, not K². Taps are made once a step, in
fp32 and in blocks of channels, for the forward and both gradients. The input gradient is the same
pass with the kernel turned round. The weight gradient slides down the rows, too, with K rows of
the incoming gradient at hand; its sums are made in parts that a second step adds in a fixed order:
no atomics, so a run repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2vit.models.ops.reference import depthwise_conv

SIZES = (3, 5, 7)
_PROGRAMS = 2048  # of the weight gradient: enough to fill a GPU
_BLOCK_W = 8
_ROWS = 28  # that a program slides over at most


@triton.jit
def _load(at: tl.tensor, valid: tl.tensor) -> tl.tensor:
    return tl.load(at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def taps_kernel(
    weight: tl.tensor,
    taps: tl.tensor,
    channels: tl.tensor,
    RESIDUAL: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """(C, K, K) as (channel blocks, K columns, K rows, BLOCK_C). Grid (channel blocks, K·K)."""
    place = tl.program_id(1)
    within = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) * BLOCK_C + within
    tap = _load(weight + channel * (K * K) + place, channel < channels)
    if RESIDUAL:
        tap += tl.where(place == (K * K) // 2, 1.0, 0.0)
    turned = (place % K) * K + place // K
    tl.store(taps + (tl.program_id(0) * (K * K) + turned) * BLOCK_C + within, tap)


@triton.jit
def forward_kernel(
    x: tl.tensor,
    taps: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    rows: tl.tensor,
    HAS_BIAS: tl.constexpr,
    FLIP: tl.constexpr,
    EVEN: tl.constexpr,
    K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """``rows`` rows of BLOCK_W columns and BLOCK_C channels. Grid (B·down·across, channel blocks).

    ``s0 ... s6`` are the sums of output rows row − K/2 ... row + K/2; the first is complete.
    """
    R: tl.constexpr = K // 2
    column = (tl.program_id(0) % across) * BLOCK_W + tl.arange(0, BLOCK_W)
    image = (tl.program_id(0) // across // down).to(tl.int64)
    first = (tl.program_id(0) // across % down) * rows
    last = tl.minimum(first + rows, height)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (column < width)[:, None]
    if not EVEN:
        exists = exists & (channel < channels)[None, :]
    source = x + image * height * width * channels
    into = out + image * height * width * channels
    tap_at = taps + tl.program_id(1) * (K * K * BLOCK_C) + tl.arange(0, BLOCK_C)[None, :]
    tap_at = tap_at + column[:, None] * 0
    start = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    s0, s1, s2, s3, s4, s5, s6 = start, start, start, start, start, start, start
    at = (first - R) * width * channels + column[:, None] * channels + channel[None, :]
    for row in range(first - R, last + R):
        within = (row >= 0) & (row < height)
        for j in range(K):
            left = column + j - R
            valid = (within & (left >= 0) & (left < width))[:, None]
            if not EVEN:
                valid = valid & (channel < channels)[None, :]
            value = _load(source + at + (j - R) * channels, valid)
            tap = tap_at + ((K - 1 - j) if FLIP else j) * (K * BLOCK_C)
            for m in tl.static_range(K):
                term = value * tl.load(tap + (m if FLIP else K - 1 - m) * BLOCK_C)
                if m == 0:
                    s0 += term
                elif m == 1:
                    s1 += term
                elif m == 2:
                    s2 += term
                elif m == 3:
                    s3 += term
                elif m == 4:
                    s4 += term
                elif m == 5:
                    s5 += term
                else:
                    s6 += term
        complete = exists & (row - R >= first)
        tl.store(into + at - R * width * channels, s0.to(out.dtype.element_ty), mask=complete)
        at += width * channels
        s0, s1 = s1, s2
        if K == 3:
            s2 = start
        else:
            s2, s3 = s3, s4
            if K == 5:
                s4 = start
            else:
                s4, s5, s6 = s5, s6, start


@triton.jit
def weight_gradient_kernel(
    x: tl.tensor,
    grad: tl.tensor,
    part: tl.tensor,
    images: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    chunk: tl.tensor,
    EVEN: tl.constexpr,
    K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One column j of the kernel over ``chunk`` images, and the bias beside the first.

    Grid (chunks, channel blocks, K). ``part`` is (chunks, C·K·K + C). ``g0 ... g6`` are rows
    row − K/2 ... row + K/2 of the incoming gradient, which input row ``row`` meets with taps
    K − 1 ... 0; ``t0 ... t6`` the sums for these.
    """
    R: tl.constexpr = K // 2
    j = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (channel < channels)[None, :]
    begin = tl.program_id(0).to(tl.int64) * chunk
    none = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    t0, t1, t2, t3, t4, t5, t6 = none, none, none, none, none, none, none
    total = none
    for image in range(begin, tl.minimum(begin + chunk, images)):
        base = image * height * width * channels
        for edge in range(0, width, BLOCK_W):
            column = edge + tl.arange(0, BLOCK_W)
            left = column + j - R
            here = (column < width)[:, None]
            there = ((column < width) & (left >= 0) & (left < width))[:, None]
            if not EVEN:
                here, there = here & inside, there & inside
            at = base + column[:, None] * channels + channel[None, :]
            shifted = at + (j - R) * channels
            g0, g1, g2, g3, g4, g5, g6 = none, none, none, none, none, none, none
            for row in range(-R, height):
                # The row that comes in is the last of those around ``row``.
                ahead = at + (row + R) * width * channels
                fresh = _load(grad + ahead, here & (row + R < height))
                g0, g1 = g1, g2
                if K == 3:
                    g2 = fresh
                else:
                    g2, g3 = g3, g4
                    if K == 5:
                        g4 = fresh
                    else:
                        g4, g5, g6 = g5, g6, fresh
                if j == 0:
                    total += fresh
                value = _load(x + shifted + row * width * channels, there & (row >= 0))
                t0 += value * g0
                t1 += value * g1
                t2 += value * g2
                if K > 3:
                    t3 += value * g3
                    t4 += value * g4
                if K > 5:
                    t5 += value * g5
                    t6 += value * g6
    into = part + tl.program_id(0).to(tl.int64) * (K * K + 1) * channels
    seen = channel < channels
    tap = into + channel * (K * K) + j
    tl.store(tap + (K - 1) * K, tl.sum(t0, 0), mask=seen)
    tl.store(tap + (K - 2) * K, tl.sum(t1, 0), mask=seen)
    tl.store(tap + (K - 3) * K, tl.sum(t2, 0), mask=seen)
    if K > 3:
        tl.store(tap + (K - 4) * K, tl.sum(t3, 0), mask=seen)
        tl.store(tap + (K - 5) * K, tl.sum(t4, 0), mask=seen)
    if K > 5:
        tl.store(tap + (K - 6) * K, tl.sum(t5, 0), mask=seen)
        tl.store(tap + (K - 7) * K, tl.sum(t6, 0), mask=seen)
    if j == 0:
        tl.store(into + K * K * channels + channel, tl.sum(total, 0), mask=seen)


def _block_channels(channels: int) -> int:
    return 64 if channels % 64 == 0 else 32


def _blocked_taps(weight: Tensor, *, residual: bool) -> Tensor:
    """(C, 1, K, K) as (channel blocks, K columns, K rows, channels of a block) in fp32."""
    channels, _, size, _ = weight.shape
    block = _block_channels(channels)
    groups = triton.cdiv(channels, block)
    taps = weight.new_empty(groups, size, size, block, dtype=torch.float32)
    with torch.cuda.device_of(weight):  # where Triton launches
        taps_kernel[(groups, size * size)](
            weight, taps, channels, RESIDUAL=residual, K=size, BLOCK_C=block, num_warps=1
        )
    return taps


def _slide(x: Tensor, taps: Tensor, bias: Tensor | None, *, flip: bool) -> Tensor:
    """The forward pass, or with ``flip`` that of the kernel turned round."""
    b, h, w, c = x.shape
    size, block = taps.shape[1], taps.shape[3]
    across, down = triton.cdiv(w, _BLOCK_W), triton.cdiv(h, _ROWS)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # where Triton launches
        forward_kernel[(b * down * across, taps.shape[0])](
            x,
            taps,
            x if bias is None else bias.contiguous(),
            out,
            h,
            w,
            c,
            across,
            down,
            min(h, _ROWS),
            HAS_BIAS=bias is not None,
            FLIP=flip,
            EVEN=c % block == 0,
            K=size,
            BLOCK_W=_BLOCK_W,
            BLOCK_C=block,
            num_warps=2 if size == 3 and block == 64 else 1,
            num_stages=1,
        )
    return out


@torch.library.custom_op("l2vit::depthwise", mutates_args=())
def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool = False
) -> tuple[Tensor, Tensor]:
    """Correlate (B, H, W, C) with (C, 1, K, K), K of ``SIZES``, zero padding.

    Args:
        residual: add ``x``.

    Returns:
        The result, contiguous; and the taps, which the gradients need.
    """
    taps = _blocked_taps(weight.contiguous(), residual=residual)
    return _slide(x.contiguous(), taps, bias, flip=False), taps


@depthwise.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool = False
) -> tuple[Tensor, Tensor]:
    channels, _, size, _ = weight.shape
    block = _block_channels(channels)
    taps = weight.new_empty(-(-channels // block), size, size, block, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), taps


@torch.library.custom_op("l2vit::depthwise_backward", mutates_args=())
def depthwise_backward(x: Tensor, taps: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the input; in fp32 that of the kernel, (C, K, K), and behind it the bias's."""
    x, grad = x.contiguous(), grad.contiguous()
    b, h, w, c = x.shape
    groups, size, _, block = taps.shape
    grad_x = _slide(grad, taps, None, flip=True)
    narrow = min(block, 32)
    groups = triton.cdiv(c, narrow)
    chunk = triton.cdiv(b, max(1, _PROGRAMS // (groups * size)))
    chunks = triton.cdiv(b, chunk)
    part = x.new_empty(chunks, (size * size + 1) * c, dtype=torch.float32)
    with torch.cuda.device_of(x):  # where Triton launches
        weight_gradient_kernel[(chunks, groups, size)](
            x,
            grad,
            part,
            b,
            h,
            w,
            c,
            chunk,
            EVEN=c % narrow == 0,
            K=size,
            BLOCK_W=_BLOCK_W,
            BLOCK_C=narrow,
            num_warps=1,
            num_stages=1,
        )
    return grad_x, part.sum(0)


@depthwise_backward.register_fake
def _(x: Tensor, taps: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    size = taps.shape[1]
    sums = x.new_empty((size * size + 1) * x.shape[3], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), sums


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else the taps get a gradient of zeros
    ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor | None, None]:
    x, taps = ctx.saved_tensors
    grad_x, sums = torch.ops.l2vit.depthwise_backward(x, taps, grad)
    rounded = sums.to(ctx.weight_dtype)  # both at once: a launch less
    weight, bias = rounded.split([ctx.weight_shape.numel(), x.shape[3]])
    same = ctx.bias_dtype in (None, ctx.weight_dtype)
    bias = bias if same else sums[-x.shape[3] :].to(ctx.bias_dtype)
    return grad_x, weight.view(ctx.weight_shape), None if ctx.bias_dtype is None else bias, None


depthwise.register_autograd(_backward, setup_context=_keep)


def check(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of a tiny input by the kernels and by PyTorch, for every size."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for size in SIZES:
        given = [(2, 5, 9, 40), (40, 1, size, size), (40,)]
        inputs = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in given]
        upstream = torch.randn(given[0], device=device, dtype=dtype)
        nchw = inputs[0].permute(0, 3, 1, 2)
        theirs = depthwise_conv(nchw, *inputs[1:]).permute(0, 2, 3, 1)
        added = torch.ops.l2vit.depthwise(*inputs, True)[0]
        ways = (torch.ops.l2vit.depthwise(*inputs)[0], theirs), (added, inputs[0] + theirs)
        for kept, out in (
            (kept, out) for way in ways for kept, out in zip(found, way, strict=True)
        ):
            kept += [out.detach(), *torch.autograd.grad(out, inputs, upstream)]
    return found
