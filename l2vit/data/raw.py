"""What backends hand over, and the last steps both share: normalise, erase, onto the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from l2vit.data.bad_samples import BadRecord
from l2vit.data.batch import Batch
from l2vit.data.draws import erase_noise
from l2vit.data.plan import Work


@dataclass
class Erasing:
    """The boxes to erase in a batch and what to put there."""

    boxes: np.ndarray
    """(n, 4) int64: top, left, height, width; height 0 for none."""
    noise: torch.Tensor
    """(sum of height · width, 3) float32, the boxes' values one after another."""

    @classmethod
    def draw(cls, boxes: np.ndarray, keys: np.ndarray) -> Erasing:
        """Make the noise of each box from its key."""
        patches = [
            erase_noise(key, height, width).reshape(-1, 3)
            for key, (_, _, height, width) in zip(keys.tolist(), boxes.tolist(), strict=True)
            if height
        ]
        noise = np.concatenate(patches) if patches else np.zeros((0, 3), np.float32)
        return cls(boxes, torch.from_numpy(noise))


@dataclass
class RawBatch:
    """A batch before normalisation."""

    work: Work
    pixels: torch.Tensor
    """(n, S, S, 3) uint8, on the CPU or already on the device."""
    ids: np.ndarray
    labels: np.ndarray
    erasing: Erasing | None = None
    bad: list[BadRecord] = field(default_factory=list)
    complete: bool = True

    def pin_memory(self) -> RawBatch:
        """Move the large parts to page-locked memory; torch's data loader calls this."""
        self.pixels = self.pixels.pin_memory()
        if self.erasing is not None:
            self.erasing.noise = self.erasing.noise.pin_memory()
        return self


class Finisher:
    """Turns raw batches into batches on ``device``."""

    def __init__(
        self,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
    ) -> None:
        self._device = device
        self._mean = (255 * torch.tensor(mean, dtype=torch.float32)).to(device)
        self._std = (255 * torch.tensor(std, dtype=torch.float32)).to(device)

    def __call__(self, raw: RawBatch) -> Batch:
        """Normalise (x − 255 mean) / (255 std), then erase; channels-last in memory."""
        pixels = raw.pixels.to(self._device, non_blocking=True)
        images = pixels.float().sub_(self._mean).div_(self._std)
        if raw.erasing is not None:
            self._erase(images, raw.erasing)
        labels = torch.from_numpy(raw.labels).to(self._device, non_blocking=True)
        return Batch(
            images=images.permute(0, 3, 1, 2),
            labels=labels,
            sample_ids=raw.ids,
            positions=raw.work.positions,
            epoch=raw.work.epoch,
        )

    def _erase(self, images: torch.Tensor, erasing: Erasing) -> None:
        noise, used = erasing.noise.to(self._device, non_blocking=True), 0
        for place, (top, left, height, width) in enumerate(erasing.boxes.tolist()):
            if height:
                patch = noise[used : used + height * width].view(height, width, 3)
                images[place, top : top + height, left : left + width] = patch
                used += height * width
