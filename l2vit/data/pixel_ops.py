"""The operations of RandAugment and colour jitter on a batch of pictures, on its device."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from l2vit.data import host_ops
from l2vit.data.draws import NO_OP


def apply_ops(
    pixels: torch.Tensor,
    ops: np.ndarray,
    arguments: np.ndarray,
    *,
    fill: tuple[int, int, int],
    interpolation: str,
) -> torch.Tensor:
    """Apply ``ops`` (n, layers; numbers in ``draws.OPS``) with ``arguments`` to each picture.

    Args:
        pixels: (n, S, S, 3) uint8; may be changed.
        ops: (n, layers) int.
        arguments: (n, layers) float.
        fill: colour left behind by geometric operations.
        interpolation: ``bicubic`` or ``bilinear``, of geometric operations.

    Returns:
        (n, S, S, 3) uint8 on the same device.
    """
    if not (ops != NO_OP).any():
        return pixels
    pixels = pixels.clone()  # the memory belongs to DALI
    for i in np.flatnonzero((ops != NO_OP).any(axis=1)).tolist():
        picture = Image.fromarray(pixels[i].numpy())
        picture = host_ops.apply_ops(
            picture, ops[i], arguments[i], fill=fill, interpolation=interpolation
        )
        pixels[i] = torch.from_numpy(np.array(picture))
    return pixels
