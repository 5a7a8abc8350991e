"""Training pictures of detection and segmentation: bytes in, bytes out, every choice given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from l2vit.dense.config import DetectAugmentConfig, SegmentAugmentConfig
from l2vit.dense.draws import Draws
from l2vit.dense.sizes import fitted_size
from l2vit.errors import UserError

PADDING = 32
"""Batches of detection have sides that are multiples of this."""
IGNORED = 255
"""The label of pixels that do not count."""
_CROPS = 10
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18


def read_picture(path: Path) -> Tensor:
    """(3, H, W) bytes.

    Raises:
        UserError: it cannot be decoded; names it.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {path} cannot be decoded: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def resized(picture: Tensor, size: Sequence[int]) -> Tensor:
    """Bytes (3, H, W) at another size: bilinear, not smoothed before shrinking."""
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    x = F.interpolate(picture[None].float(), size=tuple(size), mode="bilinear", align_corners=False)
    return x[0].round().clamp(0, 255).byte()


def resized_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Masks or labels (N, H, W) at another size, each pixel the nearest one."""
    if tuple(labels.shape[-2:]) == tuple(size) or not labels.numel():
        return labels if labels.numel() else labels.new_zeros(len(labels), *size)
    return F.interpolate(labels[None], size=tuple(size), mode="nearest")[0]


# -- detection


def detection_picture(
    picture: Tensor, target: dict[str, Tensor], augment: DetectAugmentConfig, draws: Draws
) -> tuple[Tensor, dict[str, Any]]:
    """A training picture and its target, flipped, perhaps cropped, and resized.

    Args:
        picture: (3, H, W) bytes.
        target: ``boxes``, ``labels`` and perhaps ``masks``.
        augment: what may be drawn.
        draws: the choices.
    """
    if draws.happens(augment.flip):
        picture, target = _flipped(picture, target)
    if draws.happens(augment.crop):
        short = draws.one_of(augment.crop_short_sides)
        picture, target = _fitted(picture, target, short, augment.long_side)
        picture, target = _cropped(picture, target, augment.crop_sides, draws)
    short = draws.one_of(augment.short_sides)
    picture, target = _fitted(picture, target, short, augment.long_side)
    return picture, {**target, "size": tuple(picture.shape[-2:])}


def _flipped(picture: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    width = picture.shape[-1]
    left, top, right, bottom = target["boxes"].unbind(1)
    changed = {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        changed["masks"] = target["masks"].flip(-1)
    return picture.flip(-1), {**target, **changed}


def _fitted(
    picture: Tensor, target: dict[str, Tensor], short: int, long: int
) -> tuple[Tensor, dict[str, Tensor]]:
    height, width = picture.shape[-2:]
    size = fitted_size(height, width, short=short, long=long)
    factor = torch.tensor([size[1] / width, size[0] / height] * 2)
    limits = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
    changed = {"boxes": torch.minimum(target["boxes"] * factor, limits)}
    if "masks" in target:
        changed["masks"] = resized_labels(target["masks"], size)
    return resized(picture, size), {**target, **changed}


def _cropped(
    picture: Tensor, target: dict[str, Tensor], sides: tuple[int, int], draws: Draws
) -> tuple[Tensor, dict[str, Tensor]]:
    """A window of a drawn size; objects without a part of their box in it are dropped."""
    height, width = picture.shape[-2:]
    crop_h = draws.whole(min(height, sides[0]), min(height, sides[1]))
    crop_w = draws.whole(min(width, sides[0]), min(width, sides[1]))
    top, left = draws.whole(0, height - crop_h), draws.whole(0, width - crop_w)
    rows, columns = slice(top, top + crop_h), slice(left, left + crop_w)
    boxes = target["boxes"] - torch.tensor([left, top, left, top], dtype=torch.float32)
    limits = torch.tensor([crop_w, crop_h, crop_w, crop_h], dtype=torch.float32)
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    changed = {"boxes": boxes[keep], "labels": target["labels"][keep]}
    if "masks" in target:
        changed["masks"] = target["masks"][keep][:, rows, columns]
    return picture[:, rows, columns].contiguous(), changed


def padded_batch(
    pictures: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], multiple: int = PADDING
) -> Tensor:
    """Pictures (3, H, W) of bytes, normalised, in one batch padded with zeros below and right."""
    height = -(-max(p.shape[-2] for p in pictures) // multiple) * multiple
    width = -(-max(p.shape[-1] for p in pictures) // multiple) * multiple
    device = pictures[0].device
    batch = torch.zeros(len(pictures), 3, height, width, device=device)
    shift = torch.tensor(mean, device=device).view(3, 1, 1)
    scale = torch.tensor(std, device=device).view(3, 1, 1)
    for place, picture in zip(batch, pictures, strict=True):
        place[:, : picture.shape[-2], : picture.shape[-1]] = (picture / 255 - shift) / scale
    return batch


# -- segmentation


def segmentation_picture(
    picture: Tensor, labels: Tensor, augment: SegmentAugmentConfig, draws: Draws
) -> tuple[Tensor, Tensor]:
    """A training picture and its labels: resized, cropped, flipped, colours changed.

    Args:
        picture: (3, H, W) bytes.
        labels: (H, W) bytes, 255 ignored.
        augment: what may be drawn.
        draws: the choices.
    """
    ratio = draws.between(*augment.scale)
    limits = {"short": int(augment.short_side * ratio), "long": int(augment.long_side * ratio)}
    size = fitted_size(*picture.shape[-2:], **limits)
    picture, labels = resized(picture, size), resized_labels(labels[None], size)[0]
    window = _varied_window(labels, augment, draws)
    picture, labels = picture[(slice(None), *window)], labels[window]
    if draws.happens(augment.flip):
        picture, labels = picture.flip(-1), labels.flip(-1)
    if augment.colour:
        picture = changed_colours(picture, draws)
    return picture.contiguous(), labels.contiguous()


def _varied_window(
    labels: Tensor, augment: SegmentAugmentConfig, draws: Draws
) -> tuple[slice, slice]:
    """Where to crop: drawn again while the labels inside are too much of one class."""
    height, width = labels.shape
    crop_h, crop_w = min(height, augment.crop), min(width, augment.crop)
    window = (slice(0, 0), slice(0, 0))
    for attempt in range(_CROPS + 1):
        top, left = draws.whole(0, height - crop_h), draws.whole(0, width - crop_w)
        window = (slice(top, top + crop_h), slice(left, left + crop_w))
        if attempt == _CROPS or _is_varied(labels[window], augment.largest_class):
            break
    return window


def _is_varied(labels: Tensor, largest: float) -> bool:
    counts = labels.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
    total = int(counts.sum())
    return int((counts > 0).sum()) > 1 and int(counts.max()) / total < largest


def changed_colours(picture: Tensor, draws: Draws) -> Tensor:
    """Brightness, contrast, saturation and hue, each with probability ½ (bytes to bytes).

    Contrast comes before or after the last two, by a coin.
    """
    if draws.happens(0.5):
        picture = _bytes(picture + draws.between(-_BRIGHTNESS, _BRIGHTNESS))
    early = draws.happens(0.5)
    if early:
        picture = _contrast(picture, draws)
    if draws.happens(0.5):
        picture = saturated(picture, draws.between(*_SATURATION))
    if draws.happens(0.5):
        turn = draws.whole(-_HUE, _HUE - 1) / 180
        picture = V.adjust_hue(picture, turn)
    return picture if early else _contrast(picture, draws)


def _contrast(picture: Tensor, draws: Draws) -> Tensor:
    if not draws.happens(0.5):
        return picture
    return _bytes(picture * draws.between(*_CONTRAST))


def saturated(picture: Tensor, factor: float) -> Tensor:
    """Bytes with the saturation of the HSV model times ``factor``, at most full."""
    x = picture.float()
    value, lowest = x.amax(0), x.amin(0)
    most = value / (value - lowest).clamp(min=1e-6)  # makes the lowest channel zero
    return _bytes(value - (value - x) * most.clamp(max=factor))


def _bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).byte()


def padded_labels(labels: Sequence[Tensor], height: int, width: int) -> Tensor:
    """(B, height, width) bytes: label maps padded with 255 below and right."""
    batch = torch.full((len(labels), height, width), IGNORED, dtype=torch.uint8)
    batch = batch.to(labels[0].device)
    for place, each in zip(batch, labels, strict=True):
        place[: each.shape[0], : each.shape[1]] = each
    return batch
