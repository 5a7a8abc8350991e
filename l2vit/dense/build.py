"""Models from their settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from l2vit.dense.config import (
    DetectAugmentConfig,
    DetectEvalConfig,
    DetectorConfig,
    SegmentAugmentConfig,
    SegmentEvalConfig,
    SegmentorConfig,
)
from l2vit.dense.levels import Levels, make_levels

_STAGES = (0, 1, 2, 3)


def detector(
    settings: DetectorConfig,
    augment: DetectAugmentConfig,
    evaluation: DetectEvalConfig,
    *,
    classes: int,
    grad_checkpointing: bool = False,
) -> nn.Module:
    """RetinaNet or Mask R-CNN with fresh weights; ``model.first_label`` is the first class's label.

    Args:
        settings: backbone and heads.
        augment: mean and standard deviation of pictures.
        evaluation: size of pictures in evaluation.
        classes: kinds of objects.
        grad_checkpointing: recompute the backbone's blocks in the backward pass.

    Raises:
        ConfigError: a backbone that does not exist or cannot be one.
    """
    from l2vit.dense.detectors import mask_rcnn, retinanet

    retina = settings.head == "retinanet"
    levels = _levels(settings, _STAGES[1:] if retina else _STAGES, grad_checkpointing)
    common: dict[str, Any] = {
        "classes": classes,
        "channels": settings.fpn_channels,
        "short_side": evaluation.short_side,
        "long_side": evaluation.long_side,
        "mean": augment.mean,
        "std": augment.std,
    }
    if retina:
        return retinanet(levels, **common)
    return mask_rcnn(levels, box_width=settings.box_width, mask_convs=settings.mask_convs, **common)


def segmentor(
    settings: SegmentorConfig,
    augment: SegmentAugmentConfig,
    evaluation: SegmentEvalConfig,
    *,
    classes: int,
    grad_checkpointing: bool = False,
) -> nn.Module:
    """UPerNet with fresh weights; arguments and errors as of :func:`detector`."""
    from l2vit.dense.segmentor import Segmentor

    return Segmentor(
        _levels(settings, _STAGES, grad_checkpointing, norms=False),
        classes=classes,
        channels=settings.head_channels,
        auxiliary_channels=settings.auxiliary_channels,
        short_side=evaluation.short_side,
        long_side=evaluation.long_side,
        mode=evaluation.mode,
        crop=evaluation.crop,
        stride=evaluation.stride,
        mean=augment.mean,
        std=augment.std,
    )


def _levels(
    settings: DetectorConfig | SegmentorConfig,
    stages: tuple[int, ...],
    grad_checkpointing: bool,
    *,
    norms: bool = True,
) -> Levels:
    return make_levels(
        settings.name,
        stages=stages,
        norms=norms,
        grad_checkpointing=grad_checkpointing,
        drop_path_rate=settings.drop_path_rate,
        window_size=settings.window_size,
        **settings.args,
    )
