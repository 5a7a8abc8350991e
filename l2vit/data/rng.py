"""Random numbers that are pure functions: Philox4x32-10, vectorised over many keys at once.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). NumPy has the generator
too, but one object per key; a batch of samples needs one stream per sample, all at once, and
values that no NumPy release may change.
"""

from __future__ import annotations

import hashlib

import numpy as np

LATEST_DRAWS = 2
"""Newest version of what is drawn; a run keeps the one it began with (``run.draws``)."""
_MULTIPLY_0 = np.uint64(0xD2511F53)
_MULTIPLY_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def derive_key(*parts: object) -> int:
    """A 64-bit key from anything that prints the same everywhere (numbers, strings)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def philox4x32(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10 of ``counter`` (..., 4) uint64 holding 32-bit words; returns the same shape."""
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = np.uint64(key) & _LOW, np.uint64(key) >> _HALF
    for _ in range(_ROUNDS):
        product_0, product_1 = _MULTIPLY_0 * c0, _MULTIPLY_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> _HALF) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> _HALF) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(key: int, streams: np.ndarray, count: int) -> np.ndarray:
    """``count`` float64 values in [0, 1) for each 64-bit stream number.

    Args:
        key: 64-bit key, see ``derive_key``.
        streams: (n,) integers ≥ 0; equal numbers give equal rows, whatever else is asked for.
        count: values per stream; asking for more never changes the first ones.

    Returns:
        (n, count) float64 with 53 random bits each.
    """
    words = _words(key, streams, 2 * count)
    high, low = words[:, 0::2], words[:, 1::2]
    bits = (high << np.uint64(21)) | (low >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def random_bits(key: int, streams: np.ndarray) -> np.ndarray:
    """(n,) uint64 random words, one for each stream number."""
    words = _words(key, streams, 2)
    return (words[:, 0] << _HALF) | words[:, 1]


def _words(key: int, streams: np.ndarray, count: int) -> np.ndarray:
    blocks = -(-count // 4)
    stream = np.asarray(streams).astype(np.uint64).reshape(-1, 1)
    counter = np.zeros((stream.shape[0], blocks, 4), np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    counter[..., 2] = stream & _LOW
    counter[..., 3] = stream >> _HALF
    return philox4x32(counter, key).reshape(stream.shape[0], 4 * blocks)[:, :count]


def permutation(key: int, count: int) -> np.ndarray:
    """A random order of 0 … count − 1 as int64, by sorting one random word for each."""
    order = np.empty(count, np.uint64)
    step = 1 << 18  # bounds the workspace: a counter takes 16 times the word it gives
    for start in range(0, count, step):
        stop = min(start + step, count)
        order[start:stop] = random_bits(key, np.arange(start, stop))
    return np.argsort(order, kind="stable")
