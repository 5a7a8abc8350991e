"""The operations of RandAugment and colour jitter on all pictures of a batch at once, on a GPU.

Pillow's formulas in Pillow's precision (integers, float32 where it blends, float64 where it
interpolates), so the bytes are those of timm's functions on PIL pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from l2vit.data.augment import OP_NUMBER, OPS
from l2vit.data.device import upload

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_LUMA = (19595, 38470, 7471)
"""Pillow's RGB to L, in 65536ths."""


def apply_ops(
    pixels: torch.Tensor,
    ops: np.ndarray,
    arguments: np.ndarray,
    *,
    fill: tuple[int, int, int],
    interpolation: str,
) -> torch.Tensor:
    """Apply ``ops`` (n, layers; numbers in ``augment.OPS``) with ``arguments`` to each picture.

    Args:
        pixels: (n, S, S, 3) uint8 on any device; changed in place.
        ops: (n, layers) int.
        arguments: (n, layers) float.
        fill: colour left behind by geometric operations.
        interpolation: ``bicubic`` or ``bilinear``, of geometric operations.

    Returns:
        ``pixels``.
    """
    geometric = [OP_NUMBER[name] for name in GEOMETRIC]
    for layer in range(ops.shape[1]):
        numbers, values = ops[:, layer], arguments[:, layer]
        for number, name in enumerate(OPS):
            chosen = np.flatnonzero(numbers == number)
            if len(chosen) and number not in geometric:
                at = upload(chosen, pixels.device)
                argument = upload(values[chosen], pixels.device)
                pixels[at] = _POINTWISE[name](pixels[at], argument)
        chosen = np.flatnonzero(np.isin(numbers, geometric))
        if len(chosen):
            size = pixels.shape[1]
            matrices = np.stack(
                [affine_matrix(int(numbers[i]), float(values[i]), size) for i in chosen]
            )
            at = upload(chosen, pixels.device)
            matrix = upload(matrices, pixels.device)
            pixels[at] = _affine(pixels[at], matrix, fill, interpolation)
    return pixels


def affine_matrix(number: int, argument: float, size: int) -> tuple[float, ...]:
    """Pillow's affine matrix, output to input (a, b, c, d, e, f), for a picture ``size`` wide."""
    name = OPS[number]
    if name == "ShearX":
        return 1, argument, 0, 0, 1, 0
    if name == "ShearY":
        return 1, 0, 0, argument, 1, 0
    if name == "TranslateXRel":
        return 1, 0, argument * size, 0, 1, 0
    if name == "TranslateYRel":
        return 1, 0, 0, 0, 1, argument * size
    angle = -math.radians(argument % 360.0)
    cosine, sine, centre = round(math.cos(angle), 15), round(math.sin(angle), 15), size / 2
    return (
        cosine,
        sine,
        cosine * -centre + sine * -centre + 0.0 + centre,
        round(-math.sin(angle), 15),
        cosine,
        round(-math.sin(angle), 15) * -centre + cosine * -centre + 0.0 + centre,
    )


def _affine(
    x: torch.Tensor, matrix: torch.Tensor, fill: tuple[int, int, int], interpolation: str
) -> torch.Tensor:
    """(n, S, S, 3) uint8 seen through (n, 6) float64 matrices; what lies outside is ``fill``."""
    n, size = x.shape[:2]
    place = torch.arange(size, device=x.device, dtype=torch.float64) + 0.5
    a, b, c, d, e, f = (matrix[:, i, None, None] for i in range(6))
    xs = a * place + b * place[:, None] + c
    ys = d * place + e * place[:, None] + f
    inside = (xs >= 0) & (xs < size) & (ys >= 0) & (ys < size)
    rows = x.reshape(n, size * size, 3)
    combine, taps = (_cubic, 4) if interpolation == "bicubic" else (_linear, 2)
    left, dx = _split(xs)
    top, dy = _split(ys)
    before = taps // 2 - 1
    lines = []
    for j in range(taps):
        line = (top + j - before).clamp(0, size - 1) * size
        values = []
        for i in range(taps):
            index = (line + (left + i - before).clamp(0, size - 1)).reshape(n, -1, 1)
            values.append(rows.gather(1, index.expand(-1, -1, 3)).double())
        lines.append(combine(values, dx.reshape(n, -1, 1)))
    result = combine(lines, dy.reshape(n, -1, 1)).clamp(0, 255).to(torch.uint8)
    outside = torch.tensor(fill, device=x.device, dtype=torch.uint8)
    return torch.where(inside[..., None], result.reshape(x.shape), outside)


def _split(coordinate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole and fractional part of a coordinate counted from pixel centres."""
    shifted = coordinate - 0.5
    whole = shifted.floor()
    return whole.long(), shifted - whole


def _cubic(v: list[torch.Tensor], d: torch.Tensor) -> torch.Tensor:
    """Pillow's cubic (a = −1) through four values, in its order of operations."""
    p2 = v[2] - v[0]
    p3 = 2 * (v[0] - v[1]) + v[2] - v[3]
    p4 = v[1] - v[0] - v[2] + v[3]
    return v[1] + d * (p2 + d * (p3 + d * p4))


def _linear(v: list[torch.Tensor], d: torch.Tensor) -> torch.Tensor:
    return v[0] + (v[1] - v[0]) * d


def _through_tables(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Each byte of (n, S, S, 3) replaced by its entry in (n, 3, 256)."""
    n = len(x)
    values = x.permute(0, 3, 1, 2).reshape(n, 3, -1).long()
    found = tables.to(torch.uint8).gather(2, values)
    return found.reshape(n, 3, *x.shape[1:3]).permute(0, 2, 3, 1)


def _auto_contrast(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(len(x), -1, 3)
    low, high = flat.amin(1).double()[..., None], flat.amax(1).double()[..., None]
    level = torch.arange(256, device=x.device, dtype=torch.float64)
    scale = torch.full_like(low, 255) / (high - low)  # 255.0 / x would round twice
    table = (level * scale + -low * scale).clamp(0, 255)
    return _through_tables(x, torch.where(high > low, table, level))


def _equalize(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    """``ImageOps.equalize``: each value to the share of values below it, in 255 equal steps."""
    n = len(x)
    values = x.reshape(n, -1, 3).transpose(1, 2).long()
    counts = torch.zeros((n, 3, 256), dtype=torch.long, device=x.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = values.amax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _through_tables(x, torch.where(step > 0, table, torch.arange(256, device=x.device)))


def _invert(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    return 255 - x


def _posterize(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    kept = 256 - 2 ** (8 - argument.long().clamp(0, 8))
    return x & _per_picture(kept).to(torch.uint8)


def _solarize(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    return torch.where(x < _per_picture(argument.long()), x, 255 - x)


def _solarize_add(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    added = (x.int() + _per_picture(argument.int())).clamp(max=255).to(torch.uint8)
    return torch.where(x < 128, added, x)


def _grey(x: torch.Tensor) -> torch.Tensor:
    """(n, S, S, 1) int32, Pillow's L."""
    red, green, blue = (x[..., i].int() for i in range(3))
    return ((red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 0x8000) >> 16)[..., None]


def _blend(base: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``Image.blend``: from ``base`` towards ``x`` and beyond, in float32, cut to a byte."""
    base = base.int()
    mixed = base.float() + _per_picture(factor.float()) * (x.int() - base).float()
    return mixed.clamp(0, 255).to(torch.uint8)


def _color(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    return _blend(_grey(x), x, argument)


def _contrast(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    grey = _grey(x)
    mean = grey.sum((1, 2, 3)).double() / grey[0].numel()
    return _blend(_per_picture((mean + 0.5).int()), x, argument)


def _brightness(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    return _blend(torch.zeros_like(x), x, argument)


def _sharpness(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    """Towards or away from Pillow's SMOOTH (5 in the middle, 1 around, over 13); edges stay."""
    values = x.int()
    across = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    total = across[:, :-2] + across[:, 1:-1] + across[:, 2:] + 4 * values[:, 1:-1, 1:-1]
    smooth = values.clone()
    smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded; never half-way
    return _blend(smooth, x, argument)


def _per_picture(value: torch.Tensor) -> torch.Tensor:
    """(n,) as (n, 1, 1, 1)."""
    return value[:, None, None, None]


_POINTWISE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
}
