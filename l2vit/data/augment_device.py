"""RandAugment of decoded batches on their device, by the fastest way that gives the same bytes."""

from __future__ import annotations

import functools

import numpy as np
import torch

from l2vit.data import augment_gpu, pil
from l2vit.data.augment import OPS
from l2vit.data.device import check_passes

_STRENGTH = 0.3  # an argument that every operation takes


def apply_ops(
    pixels: torch.Tensor,
    ops: np.ndarray,
    arguments: np.ndarray,
    *,
    fill: tuple[int, int, int],
    interpolation: str,
) -> torch.Tensor:
    """Apply ``ops`` to each picture; arguments as of ``augment_gpu.apply_ops``."""
    if pixels.device.type == "cpu":
        carry_out = pil.apply_ops
    elif kernels_agree(pixels.device):
        from l2vit.data.augment_triton import apply_ops as carry_out
    else:
        carry_out = augment_gpu.apply_ops
    return carry_out(pixels, ops, arguments, fill=fill, interpolation=interpolation)


@functools.cache
def kernels_agree(device: torch.device) -> bool:
    """Whether the Triton kernels give the bytes of the tensor operations on ``device``; a warning
    says where they do not. Asked once a device."""
    return check_passes("RandAugment's Triton kernels", device, lambda: _compare(device))


def _compare(device: torch.device) -> None:
    from l2vit.data import augment_triton

    for interpolation in ("bicubic", "bilinear"):
        rng = np.random.default_rng(0)
        pixels = torch.from_numpy(rng.integers(0, 256, (len(OPS), 32, 32, 3), np.uint8))
        ops = np.stack([np.arange(len(OPS)), rng.permutation(len(OPS))], axis=1)
        found = [
            carry_out(
                pixels.to(device, copy=True),
                ops,
                np.full(ops.shape, _STRENGTH),
                fill=(124, 116, 104),
                interpolation=interpolation,
            )
            for carry_out in (augment_triton.apply_ops, augment_gpu.apply_ops)
        ]
        if not torch.equal(*found):
            raise ArithmeticError(f"{interpolation} bytes differ")
