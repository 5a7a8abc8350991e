"""Depthwise convolution on (B, H, W, C): forward, and all gradients at once, accumulated in fp32.

A thread slides down the rows with its own channels of ``_COLUMNS`` columns. It keeps the taps and
the sums of the K output rows that an input row touches in registers, so each input is read and
converted once, but for the columns that neighbours share. The gradients slide the same way over
the incoming gradient and keep K rows of the input beside it: one pass over both maps gives the
input's gradient and the sums for every tap and the bias. These are made in parts that a second
kernel adds in a fixed order: no atomics, so a run repeats bit for bit.

With a residual, x + conv(x), the kernel's centre is one more: then the forward pass and the input
gradient add x and the incoming gradient for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2vit.models.ops.reference import depthwise_conv
from l2vit.models.ops.triton_sums import added_parts

SIZES = (3, 5, 7)
_COLUMNS = 7  # of a forward program; divides 56, 28, 14 and 7
_GRADIENT_COLUMNS = {3: 7, 5: 4, 7: 4}  # with 7 and a kernel of 5 or 7 some registers are spilled
_REGISTERS = 184  # of a program; the compiler would spill some to stay below 168
_GRADIENT_REGISTERS = {3: 184, 5: 184, 7: 255}
_ROWS = 56  # that a forward program slides over at most
_PROGRAMS = {3: 2048, 5: 1024, 7: 1024}  # of a warp each: about as many as fit on an H100


@triton.jit
def _row(
    at: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    valid: tl.tensor,
    affine: tl.tuple,
    NORMED: tl.constexpr,
    CHANNELS: tl.constexpr,
    HALO: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tuple:
    """A row's columns from ``column - HALO`` to ``column + COLUMNS + HALO``, zero outside; with
    ``NORMED`` times and plus the two of ``affine``."""
    values: tl.tuple = ()
    for k in tl.static_range(COLUMNS + 2 * HALO):
        exists = valid & (column + (k - HALO) < width)
        if k < HALO:
            exists = exists & (column + (k - HALO) >= 0)
        value = tl.load(at + (k - HALO) * CHANNELS, mask=exists, other=0.0).to(tl.float32)
        if NORMED:
            value = tl.where(exists, value * affine[0] + affine[1], 0.0)
        values += (value,)
    return values


@triton.jit
def _store_row(
    at: tl.tensor,
    values: tl.tuple,
    column: tl.tensor,
    width: tl.tensor,
    valid: tl.tensor,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    for c in tl.static_range(COLUMNS):
        value = values[c].to(at.dtype.element_ty)
        tl.store(at + c * CHANNELS, value, mask=valid & (column + c < width))


@triton.jit
def _norms(
    sums: tl.tuple,
    at: tl.tensor,
    values: tl.tuple,
    mean: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    valid: tl.tensor,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tuple:
    """``sums`` with those of a row: of the gradient, and of it times the centred input ``at``."""
    total, along = sums
    for c in tl.static_range(COLUMNS):
        exists = valid & (column + c < width)
        value = tl.where(exists, values[c], 0.0)
        total += value
        along += value * (tl.load(at + c * CHANNELS, mask=exists, other=0.0).to(tl.float32) - mean)
    return total, along


@triton.jit
def _correlate(
    sums: tl.tuple, row: tl.tuple, taps: tl.tuple, K: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tuple:
    """``sums`` of the K rows around ``row``, the upper first, with what ``row`` adds to them."""
    added: tl.tuple = ()
    for m in tl.static_range(K):
        for c in tl.static_range(COLUMNS):
            value = sums[m * COLUMNS + c]
            for j in tl.static_range(K):
                value += row[c + j] * taps[(K - 1 - m) * K + j]
            added += (value,)
    return added


@triton.jit
def _vectors(at: tl.tensor, inside: tl.tensor, COUNT: tl.constexpr, STEP: tl.constexpr) -> tl.tuple:
    """COUNT vectors of channels, STEP apart."""
    values: tl.tuple = ()
    for place in tl.static_range(COUNT):
        values += (tl.load(at + place * STEP, mask=inside, other=0.0),)
    return values


@triton.jit
def _store_vectors(
    at: tl.tensor, values: tl.tuple, inside: tl.tensor, COUNT: tl.constexpr, STEP: tl.constexpr
) -> None:
    for place in tl.static_range(COUNT):
        tl.store(at + place * STEP, values[place], mask=inside)


@triton.jit
def _repeated(value: tl.tensor, TIMES: tl.constexpr) -> tl.tuple:
    values: tl.tuple = ()
    for _ in tl.static_range(TIMES):
        values += (value,)
    return values


@triton.jit
def taps_kernel(
    weight: tl.tensor,
    taps: tl.tensor,
    channels: tl.tensor,
    RESIDUAL: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """(C, K, K) as (K·K, C) in fp32. Grid (channel blocks, K·K)."""
    place = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    tap = tl.load(weight + channel * (K * K) + place, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        tap += tl.where(place == (K * K) // 2, 1.0, 0.0)
    tl.store(taps + place * channels + channel, tap, mask=inside)


@triton.jit
def forward_kernel(
    x: tl.tensor,
    taps: tl.tensor,
    bias: tl.tensor,
    norm: tl.tensor,
    out: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    across: tl.tensor,
    down: tl.tensor,
    rows: tl.tensor,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """``rows`` rows of COLUMNS columns and BLOCK_C channels. Grid (B·down·across, channel blocks).

    ``sums`` are those of output rows row − K/2 ... row + K/2; the first is complete.
    """
    R: tl.constexpr = K // 2
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < CHANNELS
    tap = _vectors(taps + channel, inside, K * K, CHANNELS)
    start = tl.zeros((BLOCK_C,), tl.float32)
    affine = (start, start)
    if NORMED:
        affine = _vectors(norm + 2 * CHANNELS + channel, inside, 2, CHANNELS)
    if HAS_BIAS:
        start += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    item = tl.program_id(0)
    column = (item % across) * COLUMNS
    first = (item // across % down) * rows
    last = tl.minimum(first + rows, height)
    begin, end = tl.maximum(first - R, 0), tl.minimum(last + R, height)
    step = width * CHANNELS
    image = (item // across // down).to(tl.int64) * height * step
    at = image + begin * step + column * CHANNELS + channel
    sums = _repeated(start, K * COLUMNS)
    for row in range(begin, end):
        values = _row(x + at, column, width, inside, affine, NORMED, CHANNELS, R, COLUMNS)
        sums = _correlate(sums, values, tap, K, COLUMNS)
        complete = inside & (row - R >= first)
        _store_row(out + at - R * step, sums, column, width, complete, CHANNELS, COLUMNS)
        sums = sums[COLUMNS:] + _repeated(start, COLUMNS)
        at += step
    for m in tl.static_range(R):  # the map's last rows, below which there is nothing
        exists = inside & (end - R + m >= first) & (end - R + m < last)
        _store_row(out + at + (m - R) * step, sums, column, width, exists, CHANNELS, COLUMNS)
        sums = sums[COLUMNS:]


@triton.jit
def gradients_kernel(
    x: tl.tensor,
    grad: tl.tensor,
    taps: tl.tensor,
    norm: tl.tensor,
    grad_x: tl.tensor,
    part: tl.tensor,
    items: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    across: tl.tensor,
    chunk: tl.tensor,
    CHANNELS: tl.constexpr,
    NORMED: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """All gradients of ``chunk`` items, each COLUMNS columns of an image.

    Grid (chunks, channel blocks); ``part`` is (chunks, (K·K + 1)·C), the bias last, and with
    ``NORMED`` the gradients of the norm's weight and bias behind. ``sums`` are those of the input
    gradient's rows row − K/2 ... row + K/2, ``window`` the same rows of the input: row ``row`` of
    the incoming gradient meets them all.
    """
    R: tl.constexpr = K // 2
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < CHANNELS
    none = tl.zeros((BLOCK_C,), tl.float32)
    turned = _vectors(taps + (K * K - 1) * CHANNELS + channel, inside, K * K, -CHANNELS)
    grad_taps = _repeated(none, K * K)
    grad_bias = none
    mean, rstd, affine, norms = none, none, (none, none), (none, none)
    if NORMED:
        mean, rstd = _vectors(norm + channel, inside, 2, CHANNELS)
        affine = _vectors(norm + 2 * CHANNELS + channel, inside, 2, CHANNELS)
    step = width * CHANNELS
    start = tl.program_id(0) * chunk
    for item in range(start, tl.minimum(start + chunk, items)):
        column = (item % across) * COLUMNS
        at = (item // across).to(tl.int64) * height * step + column * CHANNELS + channel
        sums = _repeated(none, K * COLUMNS)
        window = _repeated(none, (R + 1) * COLUMNS)
        for ahead in tl.static_range(R):
            exists = inside & (ahead < height)
            under = x + at + ahead * step
            window += _row(under, column, width, exists, affine, NORMED, CHANNELS, 0, COLUMNS)
        for row in range(height):
            upstream = _row(grad + at, column, width, inside, affine, False, CHANNELS, R, COLUMNS)
            sums = _correlate(sums, upstream, turned, K, COLUMNS)
            done, above = inside & (row >= R), at - R * step
            _store_row(grad_x + above, sums, column, width, done, CHANNELS, COLUMNS)
            if NORMED:
                norms = _norms(norms, x + above, sums, mean, column, width, done, CHANNELS, COLUMNS)
            sums = sums[COLUMNS:] + _repeated(none, COLUMNS)
            exists, under = inside & (row + R < height), x + at + R * step
            fresh = _row(under, column, width, exists, affine, NORMED, CHANNELS, 0, COLUMNS)
            window = window[COLUMNS:] + fresh
            grad_taps = _products(grad_taps, window, upstream, K, COLUMNS)
            for c in tl.static_range(COLUMNS):
                grad_bias += upstream[R + c]
            at += step
        for m in tl.static_range(R):  # the map's last rows, below which there is nothing
            done, above = inside & (height - R + m >= 0), at + (m - R) * step
            _store_row(grad_x + above, sums, column, width, done, CHANNELS, COLUMNS)
            if NORMED:
                norms = _norms(norms, x + above, sums, mean, column, width, done, CHANNELS, COLUMNS)
            sums = sums[COLUMNS:]
    rows_of_part: tl.constexpr = K * K + 1 + 2 * NORMED
    into = part + tl.program_id(0).to(tl.int64) * (rows_of_part * CHANNELS) + channel
    grad_taps += (grad_bias,)
    _store_vectors(into, grad_taps, inside, K * K + 1, CHANNELS)
    if NORMED:
        into += (K * K + 1) * CHANNELS
        _store_vectors(into, (norms[1] * rstd, norms[0]), inside, 2, CHANNELS)


@triton.jit
def _products(
    grad_taps: tl.tuple,
    window: tl.tuple,
    upstream: tl.tuple,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tuple:
    """``grad_taps`` with what a row of the incoming gradient adds to them."""
    added: tl.tuple = ()
    for m in tl.static_range(K):
        for j in tl.static_range(K):
            value = grad_taps[m * K + j]
            for c in tl.static_range(COLUMNS):
                value += window[m * COLUMNS + c] * upstream[c + K - 1 - j]
            added += (value,)
    return added


def _block_channels(channels: int, size: int) -> int:
    """Two a thread where registers allow it."""
    return 64 if size == 3 and channels % 64 == 0 else 32


def _taps(weight: Tensor, *, residual: bool) -> Tensor:
    """(C, 1, K, K) as (K·K, C) in fp32."""
    channels, _, size, _ = weight.shape
    taps = weight.new_empty(size * size, channels, dtype=torch.float32)
    with torch.cuda.device_of(weight):  # where Triton launches
        taps_kernel[(triton.cdiv(channels, 64), size * size)](
            weight, taps, channels, RESIDUAL=residual, K=size, BLOCK_C=64, num_warps=1
        )
    return taps


@torch.library.custom_op("l2vit::depthwise", mutates_args=())
def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: bool = False,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Correlate (B, H, W, C) with (C, 1, K, K), K of ``SIZES``, zero padding.

    Args:
        residual: add ``x``.
        norm: (4, C) in fp32, mean, 1/deviation, scale and shift: correlate ``x·scale + shift``.
            This has no gradient here: see ``triton_local_concentration``.

    Returns:
        The result, contiguous; and the taps, (K·K, C) in fp32, which the gradients need.
    """
    x, size = x.contiguous(), weight.shape[3]
    b, h, w, c = x.shape
    taps = _taps(weight.contiguous(), residual=residual)
    across, down, block = triton.cdiv(w, _COLUMNS), triton.cdiv(h, _ROWS), _block_channels(c, size)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # where Triton launches
        forward_kernel[(b * down * across, triton.cdiv(c, block))](
            x,
            taps,
            x if bias is None else bias.contiguous(),
            taps if norm is None else norm,
            out,
            h,
            w,
            across,
            down,
            triton.cdiv(h, down),
            CHANNELS=c,
            HAS_BIAS=bias is not None,
            NORMED=norm is not None,
            K=size,
            COLUMNS=_COLUMNS,
            BLOCK_C=block,
            num_warps=1,
            num_stages=1,
            maxnreg=_REGISTERS,
        )
    return out, taps


@depthwise.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: bool = False,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    channels, _, size, _ = weight.shape
    taps = weight.new_empty(size * size, channels, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), taps


@torch.library.custom_op("l2vit::depthwise_backward", mutates_args=())
def depthwise_backward(
    x: Tensor, taps: Tensor, grad: Tensor, dtype: torch.dtype, norm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of the input; in ``dtype`` that of the kernel, (C, K, K), and of the bias behind;
    with ``norm`` the input's is that of ``x·scale + shift``, and the norm's weight and bias
    follow."""
    x, grad = x.contiguous(), grad.contiguous()
    b, h, w, c = x.shape
    size = _size(taps)
    columns, block = _GRADIENT_COLUMNS[size], _block_channels(c, size)
    across, groups = triton.cdiv(w, columns), triton.cdiv(c, block)
    chunk = triton.cdiv(b * across, max(1, _PROGRAMS[size] // groups))
    chunks = triton.cdiv(b * across, chunk)
    grad_x = torch.empty_like(x)
    part = x.new_empty(chunks, _sums(taps, norm) * c, dtype=torch.float32)
    with torch.cuda.device_of(x):  # where Triton launches
        gradients_kernel[(chunks, groups)](
            x,
            grad,
            taps,
            taps if norm is None else norm,
            grad_x,
            part,
            b * across,
            h,
            w,
            across,
            chunk,
            CHANNELS=c,
            NORMED=norm is not None,
            K=size,
            COLUMNS=columns,
            BLOCK_C=block,
            num_warps=1,
            num_stages=1,
            maxnreg=_GRADIENT_REGISTERS[size],
        )
    return grad_x, added_parts(part, dtype, c, taps=size * size)


@depthwise_backward.register_fake
def _(
    x: Tensor, taps: Tensor, grad: Tensor, dtype: torch.dtype, norm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    sums = x.new_empty(_sums(taps, norm) * x.shape[3], dtype=dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), sums


def _sums(taps: Tensor, norm: Tensor | None) -> int:
    """Of each channel: one a tap, the bias's, the norm's two."""
    return taps.shape[0] + (1 if norm is None else 3)


def _size(taps: Tensor) -> int:
    return next(size for size in SIZES if size * size == taps.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias = inputs[:3]
    ctx.save_for_backward(x, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else the taps get a gradient of zeros
    ctx.shape = weight.shape
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    x, taps = ctx.saved_tensors
    own, other = ctx.dtypes
    dtype = own if other in (None, own) else torch.float32
    grad_x, sums = torch.ops.l2vit.depthwise_backward(x, taps, grad, dtype)
    weight, bias = sums.split([ctx.shape.numel(), x.shape[3]])
    bias = None if other is None else bias.to(other)
    return grad_x, weight.view(ctx.shape).to(own), bias, None, None


depthwise.register_autograd(_backward, setup_context=_keep)


def check(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of a tiny input by the kernels and by PyTorch, for every size."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for size in SIZES:
        given = [(2, 5, 9, 40), (40, 1, size, size), (40,)]
        inputs = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in given]
        upstream = torch.randn(given[0], device=device, dtype=dtype)
        nchw = inputs[0].permute(0, 3, 1, 2)
        theirs, again = (depthwise_conv(nchw, *inputs[1:]).permute(0, 2, 3, 1) for _ in range(2))
        added = torch.ops.l2vit.depthwise(*inputs, True)[0]
        ways = (torch.ops.l2vit.depthwise(*inputs)[0], theirs), (added, inputs[0] + again)
        for kept, out in (
            (kept, out) for way in ways for kept, out in zip(found, way, strict=True)
        ):
            kept += [out.detach(), *torch.autograd.grad(out, inputs, upstream)]
    return found
