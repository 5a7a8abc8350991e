"""The settings of detection and segmentation that classification does not have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from l2vit.data.config import IMAGENET_MEAN, IMAGENET_STD
from l2vit.errors import ConfigError


@dataclass
class DetectorConfig:
    name: str
    """The backbone: a name timm knows after ``import l2vit``."""
    head: Literal["retinanet", "mask_rcnn"] = "mask_rcnn"
    """The detector around the backbone."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; grows linearly from 0."""
    window_size: int = 7
    """Windows of the backbone; what they do not divide is padded."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the backbone's constructor."""
    fpn_channels: int = 256
    """Of the feature pyramid and the convolutions of the heads."""
    box_width: int = 1024
    """Of Mask R-CNN's two linear layers."""
    mask_convs: int = 4
    """Convolutions of Mask R-CNN's mask head."""


@dataclass
class SegmentorConfig:
    name: str
    """The backbone: a name timm knows after ``import l2vit``."""
    head: Literal["upernet"] = "upernet"
    """The decoder around the backbone."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; grows linearly from 0."""
    window_size: int = 7
    """Windows of the backbone; what they do not divide is padded."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the backbone's constructor."""
    head_channels: int = 512
    """Of the decoder."""
    auxiliary_channels: int = 256
    """Of the auxiliary head on stage 3."""
    head_norm: Literal["sync", "batch"] = "sync"
    """BatchNorm of decoder and heads: over all ranks' images (GPUs only), or each rank's own."""


@dataclass
class CocoConfig:
    """Where pictures and annotations are: COCO's own layout under ``root``, or each place."""

    root: str = ""
    """Holds annotations/instances_{train,val}2017.json, train2017 and val2017."""
    train_json: str = ""
    """Annotations to train on; empty: those under ``root``."""
    train_images: str = ""
    """Folder of the pictures to train on; empty: ``root``/train2017."""
    val_json: str = ""
    """Annotations to evaluate on; empty: those under ``root``."""
    val_images: str = ""
    """Folder of the pictures to evaluate on; empty: ``root``/val2017."""
    group: int = 2
    """Pictures of one orientation that stay together; must divide the micro-batch."""
    threads: int = 4
    """Worker processes that make training pictures; 0 works in the training process."""
    prefetch: int = 2
    """Micro-batches ready ahead in each worker."""

    def validate(self) -> None:
        if self.group < 1 or self.prefetch < 1 or self.threads < 0:
            raise ConfigError("group and prefetch must be at least 1, threads not negative")

    def places(self, split: Literal["train", "val"]) -> tuple[Path, Path]:
        """(json, folder of pictures) of a split.

        Raises:
            ConfigError: neither ``root`` nor the place itself is set.
        """
        root = Path(self.root)
        json = getattr(self, f"{split}_json")
        images = getattr(self, f"{split}_images")
        if not self.root and not (json and images):
            raise ConfigError(
                f"data.root, or data.{split}_json and data.{split}_images, must be set"
            )
        return (
            Path(json) if json else root / "annotations" / f"instances_{split}2017.json",
            Path(images) if images else root / f"{split}2017",
        )


@dataclass
class ScenesConfig:
    """Where pictures and label maps are: ADE20K's own layout under ``root``, or each place."""

    root: str = ""
    """Holds images/ and annotations/, each with training and validation."""
    train_images: str = ""
    """Folder of the pictures to train on; empty: the one under ``root``."""
    train_labels: str = ""
    """Folder of their label maps; empty: the one under ``root``."""
    val_images: str = ""
    """Folder of the pictures to evaluate on; empty: the one under ``root``."""
    val_labels: str = ""
    """Folder of their label maps; empty: the one under ``root``."""
    classes: int = 150
    """Number of classes."""
    zero_is_other: bool = True
    """Label 0 means "other" and is ignored; 1 to ``classes`` become 0 to ``classes`` - 1. Else
    labels are 0 to ``classes`` - 1, and 255 is ignored."""
    names: tuple[str, ...] = ()
    """Names of the classes; empty reads objectInfo150.txt under ``root`` or numbers them."""
    threads: int = 4
    """Worker processes that make training pictures; 0 works in the training process."""
    prefetch: int = 2
    """Micro-batches ready ahead in each worker."""

    def validate(self) -> None:
        if not 1 <= self.classes <= 255 or self.prefetch < 1 or self.threads < 0:
            raise ConfigError("classes must be 1 to 255, prefetch positive, threads not negative")
        if self.names and len(self.names) != self.classes:
            raise ConfigError(f"names: {len(self.names)} names for {self.classes} classes")

    def places(self, split: Literal["training", "validation"]) -> tuple[Path, Path]:
        """(folder of pictures, folder of label maps) of a split.

        Raises:
            ConfigError: neither ``root`` nor the place itself is set.
        """
        short = {"training": "train", "validation": "val"}[split]
        images, labels = getattr(self, f"{short}_images"), getattr(self, f"{short}_labels")
        if not self.root and not (images and labels):
            raise ConfigError(
                f"data.root, or data.{short}_images and data.{short}_labels, must be set"
            )
        root = Path(self.root)
        return (
            Path(images) if images else root / "images" / split,
            Path(labels) if labels else root / "annotations" / split,
        )


@dataclass
class DetectAugmentConfig:
    """Training pictures of detection."""

    flip: float = 0.5
    """Probability of a left-right flip."""
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """One of these is drawn for the shorter side, ..."""
    long_side: int = 1333
    """... unless the longer one would be longer than this."""
    crop: float = 0.5
    """How often a picture is resized to one of ``crop_short_sides`` and cropped first."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Shorter sides to draw from before a crop."""
    crop_sides: tuple[int, int] = (384, 600)
    """Smallest and largest side of a crop."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel, from 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel."""

    def validate(self) -> None:
        for name in ("flip", "crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not a probability in [0, 1]")
        sides = (*self.short_sides, *self.crop_short_sides, *self.crop_sides, self.long_side)
        if not self.short_sides or not self.crop_short_sides or min(sides) < 1:
            raise ConfigError("short_sides, crop_short_sides and crop_sides must be positive sides")


@dataclass
class SegmentAugmentConfig:
    """Training pictures of segmentation."""

    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the factor on both sides below."""
    short_side: int = 512
    """Limit of the shorter side, in pixels, times the factor."""
    long_side: int = 2048
    """Limit of the longer side, in pixels, times the factor."""
    crop: int = 512
    """Side of the square that is cut out, and padded to where a picture is smaller."""
    largest_class: float = 0.75
    """A crop is drawn again, up to 10 times, while one class has this share of its labels."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    colour: bool = True
    """Change brightness, contrast, saturation and hue."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel, from 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel."""

    def validate(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip: {self.flip} is not a probability in [0, 1]")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale: {list(self.scale)} is not an increasing positive range")
        if min(self.short_side, self.long_side, self.crop) < 1:
            raise ConfigError("short_side, long_side and crop must be positive")


@dataclass
class DetectEvalConfig:
    every: str = "1 epochs"
    """Empty: never. The last step is always evaluated."""
    short_side: int = 800
    """The shorter side in pixels, ..."""
    long_side: int = 1333
    """... unless the longer one would be longer than this."""


@dataclass
class SegmentEvalConfig:
    every: str = "16000 steps"
    """Empty: never. The last step is always evaluated."""
    short_side: int = 512
    """Limit of the shorter side in pixels."""
    long_side: int = 2048
    """Limit of the longer side in pixels."""
    mode: Literal["whole", "slide"] = "whole"
    """The whole picture at once, or overlapping windows whose answers are averaged."""
    crop: int = 512
    """Side of the sliding window."""
    stride: int = 341
    """Pixels from one window to the next."""
