"""Local concentration (eq. 6, 7) in training: depthwise conv, GELU, BatchNorm, depthwise conv.

GELU's pass takes the statistics of the batch on the way, and the second convolution normalises
what it reads, so the norm has no pass of its own. Backwards the second convolution's gradients
give the norm's, and one pass is the gradient of norm and GELU together. Statistics are merged from
means and squared deviations, not from squares, so a large mean does no harm; they are added in
parts and in a fixed order, so a run repeats bit for bit. Everything is computed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2vit.models.ops.reference import depthwise_conv
from l2vit.models.ops.triton_depthwise import SIZES

_PROGRAMS = 1056  # eight on each multiprocessor of an H100
_BLOCK_M, _BLOCK_C = 32, 64
_PARTS = 64  # merged at a time


@triton.jit
def _normal(x: tl.tensor) -> tl.tuple:
    """The normal distribution up to ``x`` and its density there.

    By formula 26.2.17 of Abramowitz and Stegun, which is off by 7.5e-8 at most and takes a third
    of the instructions of an erf beside an exp.
    """
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.2316419 * tl.abs(x))
    tail = 1.781477937 + t * (-1.821255978 + t * 1.330274429)
    tail = density * t * (0.319381530 + t * (-0.356563782 + t * tail))
    return tl.where(x < 0, tail, 1.0 - tail), density


@triton.jit
def gelu_kernel(
    x: tl.tensor,
    out: tl.tensor,
    part: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    chunk: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """GELU of ``chunk`` rows, their means and sums of squared deviations from these.

    Grid (parts, channel blocks); ``part`` is (parts, 2, C).
    """
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, rows)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_M):  # Welford's way, each lane for itself
        row = first + tl.arange(0, BLOCK_M)
        valid = (row < end)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        below, _ = _normal(value)
        value *= below
        tl.store(out + at, value.to(out.dtype.element_ty), mask=valid)
        off = tl.where(valid, value - mean, 0.0)
        mean += off / ((first - begin) // BLOCK_M + 1)
        squares += off * (value - mean)
    lane = tl.arange(0, BLOCK_M)
    seen = (tl.maximum(end - begin - lane + BLOCK_M - 1, 0) // BLOCK_M).to(tl.float32)[:, None]
    level = tl.sum(mean * seen, 0) / (end - begin)
    off = mean - level[None, :]
    total = tl.sum(squares + seen * off * off, 0)
    into = part + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(into, level, mask=inside)
    tl.store(into + channels, total, mask=inside)


@triton.jit
def statistics_kernel(
    part: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    running_mean: tl.tensor,
    running_var: tl.tensor,
    norm: tl.tensor,
    parts: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    chunk: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    UPDATE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Mean, 1/deviation, scale and shift of a batch, (4, C). Grid (channel blocks)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    total = tl.zeros((PARTS, BLOCK_C), tl.float32)
    for first in range(0, parts, PARTS):
        index = first + tl.arange(0, PARTS)
        count = tl.maximum(tl.minimum(chunk, rows - index * chunk), 0).to(tl.float32)[:, None]
        valid = (index < parts)[:, None] & inside[None, :]
        at = index[:, None] * 2 * channels + channel[None, :]
        total += count * tl.load(part + at, mask=valid, other=0.0)
    mean = tl.sum(total, 0) / rows
    total = tl.zeros((PARTS, BLOCK_C), tl.float32)
    for first in range(0, parts, PARTS):
        index = first + tl.arange(0, PARTS)
        count = tl.maximum(tl.minimum(chunk, rows - index * chunk), 0).to(tl.float32)[:, None]
        valid = (index < parts)[:, None] & inside[None, :]
        at = index[:, None] * 2 * channels + channel[None, :]
        off = tl.load(part + at, mask=valid, other=0.0) - mean[None, :]
        total += count * off * off + tl.load(part + at + channels, mask=valid, other=0.0)
    squares = tl.sum(total, 0)
    rstd = 1.0 / tl.sqrt(squares / rows + eps)
    scale = rstd * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) - mean * scale
    tl.store(norm + channel, mean, mask=inside)
    tl.store(norm + channels + channel, rstd, mask=inside)
    tl.store(norm + 2 * channels + channel, scale, mask=inside)
    tl.store(norm + 3 * channels + channel, shift, mask=inside)
    if UPDATE:
        before = tl.load(running_mean + channel, mask=inside, other=0.0)
        tl.store(running_mean + channel, before + momentum * (mean - before), mask=inside)
        before = tl.load(running_var + channel, mask=inside, other=0.0)
        unbiased = squares / (rows - 1)
        tl.store(running_var + channel, before + momentum * (unbiased - before), mask=inside)


@triton.jit
def gelu_norm_gradient_kernel(
    x: tl.tensor,
    grad: tl.tensor,
    norm: tl.tensor,
    sums: tl.tensor,
    grad_x: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Gradient of GELU and norm. Grid (row blocks, channel blocks); ``sums`` is (2, C), the
    gradients of the norm's weight and bias."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    mean = tl.load(norm + channel, mask=inside, other=0.0)[None, :]
    rstd = tl.load(norm + channels + channel, mask=inside, other=0.0)[None, :]
    scale = tl.load(norm + 2 * channels + channel, mask=inside, other=0.0)[None, :]
    along = tl.load(sums + channel, mask=inside, other=0.0)[None, :] / rows
    level = tl.load(sums + channels + channel, mask=inside, other=0.0)[None, :] / rows
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = (row < rows)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    upstream = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
    below, density = _normal(value)
    slope = below + value * density
    standard = (value * below - mean) * rstd
    result = scale * (upstream - level - standard * along) * slope
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=valid)


@torch.library.custom_op("l2vit::gelu_statistics", mutates_args=("running_mean", "running_var"))
def gelu_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """GELU of (B, H, W, C), and its batch norm, (4, C): mean, 1/deviation, scale, shift.

    Args:
        weight, bias: of the norm.
        running_mean, running_var: in fp32, updated; None: this pass does not count.
    """
    channels = x.shape[-1]
    rows, groups = x.numel() // channels, triton.cdiv(channels, _BLOCK_C)
    chunk = triton.cdiv(rows, max(1, _PROGRAMS // groups))
    chunk = triton.cdiv(chunk, _BLOCK_M) * _BLOCK_M
    parts = triton.cdiv(rows, chunk)
    out = torch.empty_like(x)
    part = x.new_empty(parts, 2 * channels, dtype=torch.float32)
    norm = x.new_empty(4, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):  # where Triton launches
        gelu_kernel[(parts, groups)](
            x, out, part, rows, channels, chunk, BLOCK_M=_BLOCK_M, BLOCK_C=_BLOCK_C
        )
        statistics_kernel[(triton.cdiv(channels, 32),)](
            part,
            weight.contiguous(),
            bias.contiguous(),
            norm if running_mean is None else running_mean,
            norm if running_var is None else running_var,
            norm,
            parts,
            rows,
            channels,
            chunk,
            momentum,
            eps,
            UPDATE=running_mean is not None,
            PARTS=_PARTS,
            BLOCK_C=32,
        )
    return out, norm


@torch.library.custom_op("l2vit::gelu_norm_backward", mutates_args=())
def gelu_norm_backward(x: Tensor, grad: Tensor, norm: Tensor, sums: Tensor) -> Tensor:
    """Gradient of GELU's input, from that of the norm's output.

    Args:
        sums: (2·C,) in fp32, the gradients of the norm's weight and bias.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    grad_x = torch.empty_like(x)
    grid = (triton.cdiv(rows, _BLOCK_M), triton.cdiv(channels, _BLOCK_C))
    with torch.cuda.device_of(x):  # where Triton launches
        gelu_norm_gradient_kernel[grid](
            x, grad, norm, sums, grad_x, rows, channels, BLOCK_M=_BLOCK_M, BLOCK_C=_BLOCK_C
        )
    return grad_x


class _LocalConcentration(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        weight2: Tensor,
        bias2: Tensor,
    ) -> Tensor:
        x = x.contiguous()
        before, taps1 = torch.ops.l2vit.depthwise(x, weight1, bias1)
        after, norm = torch.ops.l2vit.gelu_statistics(
            before, norm_weight, norm_bias, running_mean, running_var, momentum, eps
        )
        out, taps2 = torch.ops.l2vit.depthwise(after, weight2, bias2, norm=norm)
        ctx.save_for_backward(x, taps1, before, after, norm, taps2)
        ctx.shape = weight1.shape
        ctx.dtype, ctx.norm_dtype = weight1.dtype, norm_weight.dtype
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, taps1, before, after, norm, taps2 = ctx.saved_tensors
        backward, channels = torch.ops.l2vit.depthwise_backward, x.shape[-1]
        grad, sums2 = backward(after, taps2, grads[0], torch.float32, norm)
        of_norm = sums2[-2 * channels :]
        grad = torch.ops.l2vit.gelu_norm_backward(before, grad, norm, of_norm)
        grad, sums1 = backward(x, taps1, grad, ctx.dtype)
        sizes = [ctx.shape.numel(), channels]
        weight1, bias1 = sums1.split(sizes)
        weight2, bias2, _ = sums2.to(ctx.dtype).split([*sizes, 2 * channels])
        norms = of_norm.to(ctx.norm_dtype).split(channels)
        unused = (None, None, None, None)
        convs = weight1.view(ctx.shape), weight2.view(ctx.shape)
        return grad, convs[0], bias1, *norms, *unused, convs[1], bias2


def local_concentration(*inputs: Any) -> Tensor:
    """As the reference."""
    return _LocalConcentration.apply(*inputs)  # type: ignore[no-any-return]


def check(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output, running statistics and gradients of a tiny input by the kernels and by PyTorch."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for size in SIZES:
        shapes = [(2, 5, 9, 40), *[(40, 1, size, size), (40,)] * 2, (40,), (40,)]
        drawn = [torch.randn(s, device=device, dtype=dtype) for s in shapes]
        upstream = torch.randn(shapes[0], device=device, dtype=dtype)
        for kept, form in zip(found, (local_concentration, _by_pytorch), strict=True):
            leaves = [t.detach().requires_grad_() for t in drawn]
            x, weight1, bias1, weight2, bias2, *norm = leaves
            running = [torch.ones(40, device=device) for _ in range(2)]
            out = form(x, weight1, bias1, *norm, *running, 0.1, 1e-5, weight2, bias2)
            kept += [out.detach(), *running, *torch.autograd.grad(out, leaves, upstream)]
    return found


def _by_pytorch(x: Tensor, *given: Any) -> Tensor:
    weight1, bias1, *norm, mean, variance, momentum, eps, weight2, bias2 = given
    x = torch.nn.functional.gelu(depthwise_conv(x.permute(0, 3, 1, 2), weight1, bias1))
    scale, shift = (tensor.float() for tensor in norm)
    x = torch.batch_norm(x, scale, shift, mean, variance, True, momentum, eps, False)
    return depthwise_conv(x, weight2, bias2).permute(0, 2, 3, 1)
