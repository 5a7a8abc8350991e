"""Pictures for people to look at: normalisation undone, and many in one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.utils import make_grid


def to_bytes(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised (n, 3, H, W) images as (n, H, W, 3) uint8; what lies outside is clipped."""
    values = images.detach().float().cpu().permute(0, 2, 3, 1)
    pixels = (values * torch.tensor(std) + torch.tensor(mean)) * 255
    return np.asarray(pixels.round().clamp(0, 255).to(torch.uint8).numpy())


def contact_sheet(pixels: np.ndarray, *, columns: int = 8) -> np.ndarray:
    """(n, H, W, 3) pictures in rows of ``columns``, unused places black: one (h, w, 3) picture."""
    missing = -len(pixels) % columns
    whole = np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), pixels.dtype)])
    grid = make_grid(torch.from_numpy(whole).permute(0, 3, 1, 2), nrow=columns, padding=0)
    return grid.permute(1, 2, 0).numpy()
