"""How well label maps agree: counts over a whole set, and the figures made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from l2vit.dense.transforms import IGNORED


class PixelCounts:
    """(classes, classes) pixels: rows the truth, columns the answer; ignored ones left out."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts = np.zeros((classes, classes), np.int64)

    def add(self, answers: Tensor, labels: Tensor) -> None:
        """Count one picture's pixels: two maps (H, W)."""
        answers, labels = answers.cpu().long().flatten(), labels.cpu().long().flatten()
        counted = labels != IGNORED
        pairs = labels[counted] * self.classes + answers[counted]
        square = torch.bincount(pairs, minlength=self.classes**2)
        self.counts += square.view(self.classes, self.classes).numpy()

    def figures(self) -> dict[str, float]:
        """mIoU, mAcc and aAcc from 0 to 1; classes that never occur do not count in the means."""
        right = np.diag(self.counts).astype(np.float64)
        truth, answered = self.counts.sum(1), self.counts.sum(0)
        union = truth + answered - right
        accuracy = right[truth > 0] / truth[truth > 0]
        iou = right[union > 0] / union[union > 0]
        return {
            "mIoU": float(iou.mean()) if iou.size else 0.0,
            "mAcc": float(accuracy.mean()) if accuracy.size else 0.0,
            "aAcc": float(right.sum() / max(1, truth.sum())),
        }

    def per_class(self, names: Sequence[str]) -> dict[str, float]:
        """IoU of each class by name; -1 where a class occurs in neither map."""
        right = np.diag(self.counts)
        union = self.counts.sum(1) + self.counts.sum(0) - right
        return {
            name: float(right[k] / union[k]) if union[k] else -1.0 for k, name in enumerate(names)
        }
