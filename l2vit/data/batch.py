"""What a loader yields."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Batch:
    """One micro-batch of one rank.

    Training batches hold ``micro_batch`` samples always. Evaluation batches may be shorter at
    the end; every rank then yields the same number of batches, some of them perhaps empty.
    """

    images: torch.Tensor
    """(B, 3, H, W) float32, channels-last in memory, normalised, on the loader's device."""
    labels: torch.Tensor
    """(B,) int64 on the loader's device."""
    sample_ids: np.ndarray
    """(B,) int64: which sample of the manifest each image is."""
    positions: np.ndarray
    """(B,) int64: place of each image in the epoch's global sequence."""
    epoch: int

    def __len__(self) -> int:
        return len(self.sample_ids)


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """``array`` on ``device``; on a GPU without waiting for what is under way there."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
