"""Images and targets of a micro-batch straight from its bytes, by one Triton kernel each.

``mix_kernel`` normalises a picture and its partner, erases both, mixes them and writes the result
once, in the type the network computes in; ``target_kernel`` smooths and mixes the labels. Exact
division and no fused multiply-adds, so the values are those of ``Normalizer`` and ``Mixer`` to
the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from l2vit.data import erasing

_BLOCK = 1024
FIELDS: tl.constexpr = tl.constexpr(13)
"""Of a picture, as ``MixParams.table`` says."""


def mix_images(
    images: torch.Tensor,
    table: torch.Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Mixed images (B, 3, S, S) in ``dtype``, channels-last.

    Args:
        images: (B, 3, S, S) uint8, channels-last.
        table: ``MixParams.table``, on the images' device.
        mean, std: of the three channels, in 0 … 255.
        dtype: of the result.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous()
    result = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    side = pixels.shape[1]
    grid = (len(pixels), triton.cdiv(3 * side * side, _BLOCK))
    with torch.cuda.device_of(pixels):  # where Triton launches
        mix_kernel[grid](
            pixels,
            table,
            erasing.quantiles(pixels.device),
            result,
            side,
            *mean,
            *std,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
    return result.permute(0, 3, 1, 2)


def mix_targets(
    labels: torch.Tensor, table: torch.Tensor, *, classes: int, on: float, off: float
) -> torch.Tensor:
    """Mixed targets (B, classes) float32; ``on`` and ``off`` are the values of a smoothed label."""
    result = torch.empty(len(labels), classes, dtype=torch.float32, device=labels.device)
    grid = (len(labels), triton.cdiv(classes, _BLOCK))
    with torch.cuda.device_of(labels):
        target_kernel[grid](
            labels, table, result, classes, on, off, BLOCK=_BLOCK, enable_fp_fusion=False
        )
    return result


@triton.jit
def _scrambled(x: tl.tensor) -> tl.tensor:
    """``mix`` of ``erasing``, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _weight(mine: tl.tensor) -> tl.tensor:
    return tl.load(mine + 1).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _erased(
    pixels: tl.tensor,
    quantiles: tl.tensor,
    mine: tl.tensor,
    picture: tl.tensor,
    number: tl.tensor,
    exists: tl.tensor,
    size: tl.tensor,
    mean: tl.tensor,
    std: tl.tensor,
) -> tl.tensor:
    """Values of a picture: normalised bytes, and noise within its erased box."""
    top, left = tl.load(mine + 7), tl.load(mine + 8)
    height, width = tl.load(mine + 9), tl.load(mine + 10)
    row, column = number // 3 // size, number // 3 % size
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    source = pixels + picture.to(tl.int64) * size * size * 3
    byte = tl.load(source + number, mask=exists & ~inside, other=0)
    value = tl.div_rn(byte.to(tl.float32) - mean, std)
    a, b = tl.load(mine + 11).to(tl.uint32), tl.load(mine + 12).to(tl.uint32)
    level = _scrambled(_scrambled(number.to(tl.uint32) ^ a) + b) >> 16
    noise = tl.load(quantiles + level.to(tl.int32), mask=exists & inside, other=0.0)
    return tl.where(inside, noise, value)


@triton.jit
def mix_kernel(
    pixels: tl.tensor,
    table: tl.tensor,
    quantiles: tl.tensor,
    result: tl.tensor,
    size: tl.tensor,
    mean_red: tl.tensor,
    mean_green: tl.tensor,
    mean_blue: tl.tensor,
    std_red: tl.tensor,
    std_green: tl.tensor,
    std_blue: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK values of a picture, in memory's order. Grid (pictures, blocks)."""
    picture = tl.program_id(0)
    mine = table + picture * FIELDS
    partner = tl.load(mine)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = number < 3 * size * size
    channel = number % 3
    mean = tl.where(channel == 0, mean_red, tl.where(channel == 1, mean_green, mean_blue))
    std = tl.where(channel == 0, std_red, tl.where(channel == 1, std_green, std_blue))
    own = _erased(pixels, quantiles, mine, picture, number, exists, size, mean, std)
    theirs = table + partner * FIELDS
    other = _erased(pixels, quantiles, theirs, partner, number, exists, size, mean, std)
    row, column = number // 3 // size, number // 3 % size
    inside = (row >= tl.load(mine + 3)) & (row < tl.load(mine + 4))
    inside &= (column >= tl.load(mine + 5)) & (column < tl.load(mine + 6))
    share = tl.where(tl.load(mine + 2) != 0, tl.where(inside, 0.0, 1.0), _weight(mine))
    mixed = own * share + other * (1.0 - share)
    into = result + picture.to(tl.int64) * size * size * 3
    tl.store(into + number, mixed.to(result.dtype.element_ty), mask=exists)


@triton.jit
def target_kernel(
    labels: tl.tensor,
    table: tl.tensor,
    result: tl.tensor,
    classes: tl.tensor,
    on: tl.tensor,
    off: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK classes of a picture's target. Grid (pictures, blocks)."""
    picture = tl.program_id(0)
    mine = table + picture * FIELDS
    weight = _weight(mine)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = tl.where(number == tl.load(labels + picture), on, off)
    other = tl.where(number == tl.load(labels + tl.load(mine)), on, off)
    into = result + picture.to(tl.int64) * classes
    tl.store(into + number, own * weight + other * (1.0 - weight), mask=number < classes)
