"""Anchors at fixed strides, and which object each of them is matched with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator

RATIOS = (0.5, 1.0, 2.0)
"""Height to width."""


class FixedStrideAnchors(AnchorGenerator):
    """torchvision's anchors with the strides given, corners not rounded, always in fp32.

    torchvision divides the image's size by the grid's, which is another stride wherever the grid
    was rounded up, and cuts corners to whole pixels.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], strides: Sequence[int]) -> None:
        """``sizes`` of each level's anchors are square roots of areas, in pixels."""
        super().__init__(tuple(tuple(s) for s in sizes), (RATIOS,) * len(sizes))
        self.strides = list(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """(ratios × scales, 4) corners of the anchors about the origin."""
        size = torch.tensor(scales, dtype=torch.float64)
        root = torch.tensor(aspect_ratios, dtype=torch.float64).sqrt()
        width = (size[None, :] / root[:, None]).flatten() / 2
        height = (size[None, :] * root[:, None]).flatten() / 2
        return torch.stack([-width, -height, width, height], dim=1).to(device, dtype)

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        """(anchors, 4) for each image, level after level, row by row."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids: Any = [feature.shape[-2:] for feature in feature_maps]
        strides: Any = [(stride, stride) for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors for _ in image_list.image_sizes]


class AnchorMatcher(Matcher):
    """Matches anchors with objects; an object's best anchors become its own, ties included.

    torchvision gives such an anchor to the object that the anchor overlaps most, so an object may
    be left with none.

    Args:
        high: IoU from which an anchor is positive.
        low: IoU below which it is negative; between the two it is ignored.
        best_from: IoU from which an object's best anchors become its own.
    """

    def __init__(self, high: float, low: float, best_from: float = 0.0) -> None:
        super().__init__(high, low, allow_low_quality_matches=True)
        self.best_from = best_from

    def set_low_quality_matches_(
        self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor
    ) -> None:
        """Write each object's number to its best anchors; the last object wins."""
        quality = match_quality_matrix
        best = quality.max(dim=1, keepdim=True).values
        own = (quality == best) & (best >= self.best_from) & (best > 0)
        numbers = torch.arange(1, len(quality) + 1, device=quality.device)
        last = (own * numbers[:, None]).max(dim=0).values
        matches[last > 0] = last[last > 0] - 1
