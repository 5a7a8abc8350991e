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
def quantiles(device: torch.device) -> torch.Tensor:
    """Φ⁻¹ of the middles of 2^16 equal parts, (2^16,) float32."""
    middles = (np.arange(_LEVELS) + 0.5) / _LEVELS
    return torch.from_numpy(ndtri(middles).astype(np.float32)).to(device)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers, held in int64."""
    for shift, factor in _STEPS:
        x = ((x ^ (x >> shift)) * factor) & _MASK  # the product's low bits survive an overflow
    return x ^ (x >> _LAST_SHIFT)


def _mix_in_place(x: np.ndarray, room: np.ndarray) -> None:
    """The same of uint32, ``room`` being as large as ``x``."""
    for shift, factor in _STEPS:
        np.right_shift(x, shift, out=room)
        x ^= room
        x *= np.uint32(factor)
    np.right_shift(x, _LAST_SHIFT, out=room)
    x ^= room


def words_of(keys: np.ndarray) -> np.ndarray:
    """a and b of keys (n,) uint64; (2, n) int64."""
    low, high = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    room = np.empty_like(low)
    a = low + np.uint32(_GOLDEN) * high
    _mix_in_place(a, room)
    b = a ^ high ^ np.uint32(_OTHER)
    _mix_in_place(b, room)
    return np.stack([a, b]).astype(np.int64)


def noise(places: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Standard normal values of pixels, (n, 3) float32.

    Args:
        places: (n,) int64: y S + x of each pixel.
        a, b: (n,) int64: its picture's, see ``words_of``.
    """
    numbers = 3 * places[:, None] + torch.arange(3, device=places.device)
    mixed = _mix(numbers ^ a[:, None])
    mixed = _mix((mixed + b[:, None]) & _MASK)
    return quantiles(places.device)[mixed >> 16]


def erase(images: torch.Tensor, boxes: np.ndarray, keys: np.ndarray) -> None:
    """Fill each picture's box with noise, on a GPU all at once.

    Args:
        images: (n, S, S, 3) floating, contiguous; changed in place.
        boxes: (n, 4) int64: top, left, height, width; height 0 for none.
        keys: (n,) uint64 below 2^63.
    """
    words = words_of(keys)
    if images.device.type == "cpu":
        for place in np.flatnonzero(boxes[:, 2]).tolist():
            top, left, height, width = boxes[place].tolist()
            a, b = words[:, place].tolist()
            values = _noise_of_box(images.shape[1], top, left, height, width, a, b)
            images[place, top : top + height, left : left + width] = torch.from_numpy(values)
    elif boxes[:, 2].any():
        which, rows, columns = _pixels_of(boxes, images.device)
        keyed = upload(words, images.device)[:, which].unbind()
        drawn = noise(rows * images.shape[1] + columns, *keyed)
        images[which, rows, columns] = drawn.to(images.dtype)


def fill(images: torch.Tensor, boxes: np.ndarray, values: torch.Tensor) -> None:
    """Fill boxes, as of ``erase``, with ``values`` (pixels of all boxes in order, 3)."""
    if boxes[:, 2].any():
        images[_pixels_of(boxes, images.device)] = values.to(images.dtype)


def _pixels_of(
    boxes: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Picture, row and column of every pixel in a box; each (pixels,) int64."""
    top, left, height, width = boxes.T
    areas = height * width
    first = np.cumsum(areas) - areas
    table = upload(np.stack([np.arange(len(boxes)), top, left, width, first, areas]), device)
    total = int(areas.sum())
    repeated = torch.repeat_interleave(table[-1], output_size=total)
    which, tops, lefts, widths, firsts = table[:-1, repeated].unbind()
    offset = torch.arange(total, device=device) - firsts
    return which, tops + offset // widths, lefts + offset % widths


def _noise_of_box(
    side: int, top: int, left: int, height: int, width: int, a: int, b: int
) -> np.ndarray:
    """(height, width, 3) float32: ``noise`` of a box on the CPU, in a quarter of the time."""
    starts = 3 * (np.arange(top, top + height)[:, None] * side + left)
    x: np.ndarray = (starts + np.arange(3 * width)).astype(np.uint32)
    room = np.empty_like(x)
    x ^= np.uint32(a)
    _mix_in_place(x, room)
    x += np.uint32(b)
    _mix_in_place(x, room)
    x >>= 16
    table = quantiles(torch.device("cpu")).numpy()
    return table[x].reshape(height, width, 3)
