"""Noise for erased boxes, drawn where the pictures are: the same bits on a CPU and on a GPU.

The value of channel c of the pixel in row y and column x of a picture S wide with key k is::

    n = 3 (y S + x) + c
    a = mix(k + 0x9E3779B9 ⌊k / 2^32⌋)
    b = mix(a xor ⌊k / 2^32⌋ xor 0x85EBCA6B)
    h = mix(mix(n xor a) + b)
    value = Φ⁻¹((⌊h / 2^16⌋ + 1/2) / 2^16)

where all but the last line is modulo 2^32, Φ⁻¹ is the inverse of the normal distribution, in
float32, and ``mix`` of a 32-bit x is: x xor ⌊x / 2^16⌋; times 0x7FEB352D; xor ⌊x / 2^15⌋; times
0x846CA68B; xor ⌊x / 2^16⌋. Only whole numbers and a table are used, so no device rounds
differently. This is version 2 of ``run.draws``; version 1 draws on the host
(``augment.erase_values``).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from scipy.special import ndtri

from l2vit.data.device import upload

_MASK = 0xFFFFFFFF
_STEPS = ((16, 0x7FEB352D), (15, 0x846CA68B))
_LAST_SHIFT = 16
_GOLDEN, _OTHER = 0x9E3779B9, 0x85EBCA6B
_LEVELS = 1 << 16


@functools.cache
def _quantiles(device: torch.device) -> torch.Tensor:
    """Φ⁻¹ of the middles of 2^16 equal parts."""
    middles = (np.arange(_LEVELS) + 0.5) / _LEVELS
    return torch.from_numpy(ndtri(middles).astype(np.float32)).to(device)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers, held in int64."""
    for shift, factor in _STEPS:
        x = ((x ^ (x >> shift)) * factor) & _MASK  # the product's low bits survive an overflow
    return x ^ (x >> _LAST_SHIFT)


def words_of(keys: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b of keys (n,) uint64 below 2^63; each (n,) int64."""
    k = torch.from_numpy(keys.astype(np.int64))
    high = k >> 32
    a = _mix((k + _GOLDEN * high) & _MASK)
    return a, _mix(a ^ (high & _MASK) ^ _OTHER)


def noise(places: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Standard normal values of pixels, (n, 3) float32.

    Args:
        places: (n,) int64: y S + x of each pixel.
        a, b: (n,) int64: its picture's, see ``words_of``.
    """
    numbers = 3 * places[:, None] + torch.arange(3, device=places.device)
    mixed = _mix(numbers ^ a[:, None])
    mixed = _mix((mixed + b[:, None]) & _MASK)
    return _quantiles(places.device)[mixed >> 16]


def erase(images: torch.Tensor, boxes: np.ndarray, keys: np.ndarray) -> None:
    """Fill each picture's box with noise, all at once.

    Args:
        images: (n, S, S, 3) floating, contiguous; changed in place.
        boxes: (n, 4) int64: top, left, height, width; height 0 for none.
        keys: (n,) uint64 below 2^63.
    """
    erased = np.flatnonzero(boxes[:, 2])
    if not len(erased):
        return
    side, (top, left, height, width) = images.shape[1], boxes[erased].T
    areas = height * width
    first = np.cumsum(areas) - areas
    words = [word.numpy() for word in words_of(keys[erased])]
    pictures = np.stack([erased * side * side, top, left, width, first, *words, areas])
    table = upload(pictures, images.device)
    total = int(areas.sum())
    which = torch.repeat_interleave(table[-1], output_size=total)
    start, tops, lefts, widths, firsts, a, b = table[:-1, which].unbind()
    offset = torch.arange(total, device=images.device) - firsts
    places = (tops + offset // widths) * side + lefts + offset % widths
    images.view(-1, 3)[start + places] = noise(places, a, b).to(images.dtype)
