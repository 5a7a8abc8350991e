"""RandAugment on a GPU by two Triton kernels a layer, the same bytes as ``augment_gpu``.

``table_kernel`` makes, for each picture and channel, the table of 256 bytes that a pointwise
operation comes to, from the picture's histogram where it needs one. ``gather_kernel`` makes every
byte of the result: through the table, or from its neighbours (affine maps, sharpness), or from the
pixel's grey (colour). float64 and float32 as in Pillow and no fused multiply-adds, so bytes are
equal.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from l2vit.data.augment import NO_OP, OP_NUMBER
from l2vit.data.augment_gpu import GEOMETRIC, affine_matrix
from l2vit.data.device import upload

_FIELDS = 9
"""Of a picture and layer, float64: mode, table, argument, affine matrix (6)."""
_TABLE, _AFFINE, _COLOR, _SHARPNESS = range(4)
_SAME = -1
_BLOCK = 512
AUTO_CONTRAST: tl.constexpr = tl.constexpr(OP_NUMBER["AutoContrast"])
EQUALIZE: tl.constexpr = tl.constexpr(OP_NUMBER["Equalize"])
INVERT: tl.constexpr = tl.constexpr(OP_NUMBER["Invert"])
POSTERIZE: tl.constexpr = tl.constexpr(OP_NUMBER["Posterize"])
SOLARIZE: tl.constexpr = tl.constexpr(OP_NUMBER["Solarize"])
SOLARIZE_ADD: tl.constexpr = tl.constexpr(OP_NUMBER["SolarizeAdd"])
BRIGHTNESS: tl.constexpr = tl.constexpr(OP_NUMBER["Brightness"])
CONTRAST: tl.constexpr = tl.constexpr(OP_NUMBER["Contrast"])


def apply_ops(
    pixels: torch.Tensor,
    ops: np.ndarray,
    arguments: np.ndarray,
    *,
    fill: tuple[int, int, int],
    interpolation: str,
) -> torch.Tensor:
    """As ``augment_gpu.apply_ops``; the result may be another tensor than ``pixels``."""
    count, size = pixels.shape[:2]
    layers = ops.shape[1]
    plan = upload(_plan(ops, arguments, size), pixels.device)
    pixels = pixels.contiguous()
    result = torch.empty_like(pixels)
    tables = torch.empty(count, 3, 256, dtype=torch.uint8, device=pixels.device)
    area = size * size
    grid = (count, triton.cdiv(area, _BLOCK))
    with torch.cuda.device_of(pixels):  # where Triton launches
        for layer in range(layers):
            table_kernel[(count, 3)](
                pixels, plan, tables, layer, layers, area, BLOCK=1024, enable_fp_fusion=False
            )
            gather_kernel[grid](
                pixels,
                plan,
                tables,
                result,
                layer,
                layers,
                size,
                *fill,
                CUBIC=interpolation == "bicubic",
                BLOCK=_BLOCK,
                enable_fp_fusion=False,
            )
            pixels, result = result, pixels
    return pixels


def _plan(ops: np.ndarray, arguments: np.ndarray, size: int) -> np.ndarray:
    """(n, layers, _FIELDS): what the kernels are to do with each picture."""
    plan = np.zeros((*ops.shape, _FIELDS))
    plan[..., 1] = np.where(ops == NO_OP, _SAME, ops)
    plan[..., 2] = arguments
    plan[ops == OP_NUMBER["Color"], 0] = _COLOR
    plan[ops == OP_NUMBER["Sharpness"], 0] = _SHARPNESS
    geometric = np.isin(ops, [OP_NUMBER[name] for name in GEOMETRIC])
    plan[geometric, 0] = _AFFINE
    for place in zip(*np.nonzero(geometric), strict=True):
        plan[place][3:] = affine_matrix(int(ops[place]), float(arguments[place]), size)
    return plan


@triton.jit
def _cut(value: tl.tensor) -> tl.tensor:
    """A float as a byte in int32: within 0 … 255, what is behind the point dropped."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _blended(base: tl.tensor, value: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """From ``base`` towards ``value`` and beyond, in float32."""
    return _cut(base.to(tl.float32) + factor * (value - base).to(tl.float32))


@triton.jit
def _grey(red: tl.tensor, green: tl.tensor, blue: tl.tensor) -> tl.tensor:
    """Pillow's L of int32 channels."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def table_kernel(
    pixels: tl.tensor,
    plan: tl.tensor,
    tables: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    area: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The table of one picture and channel. Grid (pictures, 3)."""
    picture, channel = tl.program_id(0), tl.program_id(1)
    mine = plan + (picture.to(tl.int64) * layers + layer) * 9
    operation = tl.load(mine + 1).to(tl.int32)
    argument = tl.load(mine + 2)
    whole = argument.to(tl.int32)
    source = pixels + picture.to(tl.int64) * area * 3
    value = tl.arange(0, 256)
    table = value
    if (operation == AUTO_CONTRAST) | (operation == EQUALIZE):
        counts = tl.zeros((256,), tl.int32)
        for begin in range(0, area, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            seen = tl.load(source + at * 3 + channel, mask=at < area, other=0).to(tl.int32)
            counts += tl.histogram(seen, 256, mask=at < area).to(tl.int32)
        high = tl.max(tl.where(counts > 0, value, 0), 0)
        low = tl.min(tl.where(counts > 0, value, 255), 0)
        if operation == EQUALIZE:
            last = tl.sum(tl.where(value == high, counts, 0), 0)
            step = (area - last) // 255
            below = tl.cumsum(counts, 0) - counts
            equal = tl.minimum((step // 2 + below) // tl.maximum(step, 1), 255)
            table = tl.where(step > 0, equal, value)
        else:
            start = low.to(tl.float64)
            scale = tl.full((1,), 255.0, tl.float64) / tl.maximum(high - low, 1).to(tl.float64)
            spread = _cut(value.to(tl.float64) * scale + -start * scale)
            table = tl.where(high > low, spread, value)
    elif operation == CONTRAST:
        summed = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, area, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            red = tl.load(source + at * 3, mask=at < area, other=0).to(tl.int32)
            green = tl.load(source + at * 3 + 1, mask=at < area, other=0).to(tl.int32)
            blue = tl.load(source + at * 3 + 2, mask=at < area, other=0).to(tl.int32)
            summed += tl.where(at < area, _grey(red, green, blue), 0)
        mean = tl.sum(summed.to(tl.int64), 0).to(tl.float64) / area.to(tl.float64)
        base = (mean + 0.5).to(tl.int32)
        table = _blended(base + value * 0, value, argument.to(tl.float32))
    elif operation == BRIGHTNESS:
        table = _blended(value * 0, value, argument.to(tl.float32))
    elif operation == INVERT:
        table = 255 - value
    elif operation == POSTERIZE:
        kept = 256 - (1 << (8 - tl.minimum(tl.maximum(whole, 0), 8)))
        table = value & kept
    elif operation == SOLARIZE:
        table = tl.where(value < whole, value, 255 - value)
    elif operation == SOLARIZE_ADD:
        table = tl.where(value < 128, tl.minimum(value + whole, 255), value)
    tl.store(tables + (picture * 3 + channel) * 256 + value, table.to(tl.uint8))


@triton.jit
def _through(
    v0: tl.tensor,
    v1: tl.tensor,
    v2: tl.tensor,
    v3: tl.tensor,
    d: tl.tensor,
    CUBIC: tl.constexpr,
) -> tl.tensor:
    """Pillow's cubic (a = −1), or a line through the middle two, in its order of operations."""
    if CUBIC:
        p2 = v2 - v0
        p3 = 2 * (v0 - v1) + v2 - v3
        p4 = v1 - v0 - v2 + v3
        result = v1 + d * (p2 + d * (p3 + d * p4))
    else:
        result = v1 + (v2 - v1) * d
    return result


@triton.jit
def _at(
    source: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    size: tl.tensor,
    channel: tl.tensor,
) -> tl.tensor:
    """The byte at a place, or at the nearest one of the picture, as float64."""
    row = tl.minimum(tl.maximum(row, 0), size - 1)
    column = tl.minimum(tl.maximum(column, 0), size - 1)
    return tl.load(source + (row * size + column) * 3 + channel).to(tl.float64)


@triton.jit
def _line(
    source: tl.tensor,
    row: tl.tensor,
    left: tl.tensor,
    dx: tl.tensor,
    size: tl.tensor,
    channel: tl.tensor,
    CUBIC: tl.constexpr,
) -> tl.tensor:
    v1 = _at(source, row, left, size, channel)
    v2 = _at(source, row, left + 1, size, channel)
    v0, v3 = v1, v2
    if CUBIC:
        v0 = _at(source, row, left - 1, size, channel)
        v3 = _at(source, row, left + 2, size, channel)
    return _through(v0, v1, v2, v3, dx, CUBIC)


@triton.jit
def _affine(
    source: tl.tensor,
    top: tl.tensor,
    left: tl.tensor,
    dy: tl.tensor,
    dx: tl.tensor,
    size: tl.tensor,
    channel: tl.tensor,
    CUBIC: tl.constexpr,
) -> tl.tensor:
    v1 = _line(source, top, left, dx, size, channel, CUBIC)
    v2 = _line(source, top + 1, left, dx, size, channel, CUBIC)
    v0, v3 = v1, v2
    if CUBIC:
        v0 = _line(source, top - 1, left, dx, size, channel, CUBIC)
        v3 = _line(source, top + 2, left, dx, size, channel, CUBIC)
    return _cut(_through(v0, v1, v2, v3, dy, CUBIC))


@triton.jit
def _sharpness(
    source: tl.tensor,
    at: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    size: tl.tensor,
    channel: tl.tensor,
    factor: tl.tensor,
) -> tl.tensor:
    """Towards or away from Pillow's SMOOTH (5 in the middle, 1 around, over 13); edges stay."""
    middle = tl.load(source + at * 3 + channel).to(tl.int32)
    inner = (row > 0) & (row < size - 1) & (column > 0) & (column < size - 1)
    total = 4 * middle
    for down in tl.static_range(-1, 2):
        for right in tl.static_range(-1, 2):
            near = source + (at + down * size + right) * 3 + channel
            total += tl.load(near, mask=inner, other=0).to(tl.int32)
    smooth = tl.where(inner, (2 * total + 13) // 26, middle)  # total / 13, rounded
    return _blended(smooth, middle, factor)


@triton.jit
def gather_kernel(
    pixels: tl.tensor,
    plan: tl.tensor,
    tables: tl.tensor,
    result: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    size: tl.tensor,
    fill_red: tl.tensor,
    fill_green: tl.tensor,
    fill_blue: tl.tensor,
    CUBIC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK pixels of a picture. Grid (pictures, blocks)."""
    picture = tl.program_id(0)
    mine = plan + (picture.to(tl.int64) * layers + layer) * 9
    mode = tl.load(mine).to(tl.int32)
    factor = tl.load(mine + 2).to(tl.float32)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = index < size * size
    at = tl.where(exists, index, 0)
    row, column = at // size, at % size
    source = pixels + picture.to(tl.int64) * size * size * 3
    into = result + picture.to(tl.int64) * size * size * 3 + at * 3
    if mode == 0:
        for channel in tl.static_range(3):
            value = tl.load(source + at * 3 + channel).to(tl.int32)
            table = tables + (picture * 3 + channel) * 256
            tl.store(into + channel, tl.load(table + value), mask=exists)
    elif mode == 1:
        x, y = column.to(tl.float64) + 0.5, row.to(tl.float64) + 0.5
        across = tl.load(mine + 3) * x + tl.load(mine + 4) * y + tl.load(mine + 5)
        down = tl.load(mine + 6) * x + tl.load(mine + 7) * y + tl.load(mine + 8)
        inside = (across >= 0) & (across < size) & (down >= 0) & (down < size)
        left, top = tl.floor(across - 0.5), tl.floor(down - 0.5)
        dx, dy = (across - 0.5) - left, (down - 0.5) - top
        left, top = left.to(tl.int32), top.to(tl.int32)
        red = _affine(source, top, left, dy, dx, size, 0, CUBIC)
        green = _affine(source, top, left, dy, dx, size, 1, CUBIC)
        blue = _affine(source, top, left, dy, dx, size, 2, CUBIC)
        tl.store(into, tl.where(inside, red, fill_red).to(tl.uint8), mask=exists)
        tl.store(into + 1, tl.where(inside, green, fill_green).to(tl.uint8), mask=exists)
        tl.store(into + 2, tl.where(inside, blue, fill_blue).to(tl.uint8), mask=exists)
    elif mode == 2:
        red = tl.load(source + at * 3).to(tl.int32)
        green = tl.load(source + at * 3 + 1).to(tl.int32)
        blue = tl.load(source + at * 3 + 2).to(tl.int32)
        grey = _grey(red, green, blue)
        tl.store(into, _blended(grey, red, factor).to(tl.uint8), mask=exists)
        tl.store(into + 1, _blended(grey, green, factor).to(tl.uint8), mask=exists)
        tl.store(into + 2, _blended(grey, blue, factor).to(tl.uint8), mask=exists)
    else:
        for channel in tl.static_range(3):
            value = _sharpness(source, at, row, column, size, channel, factor)
            tl.store(into + channel, value.to(tl.uint8), mask=exists)
