"""Answers drawn on pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

_GOLDEN = 0.618034


def colours(count: int) -> list[tuple[int, int, int]]:
    """``count`` colours, neighbours far apart."""
    found = []
    for number in range(count):
        light = 0.95 - 0.25 * (number % 3) / 2
        values = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.85, light)
        red, green, blue = (round(255 * v) for v in values)
        found.append((red, green, blue))
    return found


def draw_detections(
    picture: Tensor, found: Mapping[str, Tensor], names: Sequence[str], *, least: float = 0.3
) -> Tensor:
    """(3, H, W) bytes with the boxes, masks, names and scores of what scores ``least`` and more.

    Args:
        picture: (3, H, W) bytes.
        found: ``boxes``, ``scores``, ``labels`` from 0, and ``masks`` where there are.
        names: of the classes.
        least: lowest score shown.
    """
    keep = found["scores"] >= least
    if not bool(keep.any()):
        return picture
    labels = found["labels"][keep].tolist()
    palette = colours(len(names))
    chosen = [palette[label] for label in labels]
    if "masks" in found:
        picture = draw_segmentation_masks(picture, found["masks"][keep], alpha=0.5, colors=chosen)
    texts = [
        f"{names[label]} {score:.2f}"
        for label, score in zip(labels, found["scores"][keep].tolist(), strict=True)
    ]
    return draw_bounding_boxes(picture, found["boxes"][keep], texts, colors=chosen)


def draw_labels(picture: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(3, H, W) bytes, half the picture and half the colours of its classes (H, W)."""
    palette = torch.tensor(colours(classes), dtype=torch.float32)
    known = labels < classes
    tint = palette[labels.long().clamp(max=classes - 1)].permute(2, 0, 1)
    mixed = (picture.float() + tint) / 2
    return torch.where(known, mixed, picture.float()).round().byte()


def one_sheet(pictures: Sequence[Tensor]) -> np.ndarray:
    """(h, w, 3) bytes: pictures (3, H, W) of any sizes side by side, black between them."""
    height = max(picture.shape[1] for picture in pictures)
    parts = []
    for picture in pictures:
        part = torch.zeros(3, height, picture.shape[2] + 4, dtype=torch.uint8)
        part[:, : picture.shape[1], : picture.shape[2]] = picture
        parts.append(part)
    return torch.cat(parts, dim=2).permute(1, 2, 0).contiguous().numpy()
