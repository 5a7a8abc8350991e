"""UPerNet over a backbone: the decoder of segmentation_models_pytorch and what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from l2vit.data.config import IMAGENET_MEAN, IMAGENET_STD
from l2vit.dense.levels import LEVEL_EPS, Levels
from l2vit.dense.sizes import fitted_size
from l2vit.dense.transforms import IGNORED

_DROPOUT = 0.1
_AUXILIARY_WEIGHT = 0.4


class Segmentor(nn.Module):
    """Pictures to a class for every pixel.

    In training ``forward(images, labels)`` takes a normalised batch and labels (B, H, W) and gives
    the losses; in evaluation ``forward(images)`` takes a list of pictures with values in [0, 1]
    and gives a list of label maps of the same sizes.

    Args:
        levels: the backbone with all four stages and without norms of its own: the decoder has
            them.
        classes: outputs.
        channels: of the decoder.
        auxiliary_channels: of the head on the third stage that helps in training.
        short_side: of pictures in evaluation, at most.
        long_side: of pictures in evaluation, at most.
        mode: whole pictures, or ``slide`` a window of ``crop`` by ``stride`` over them.
        mean: subtracted from pictures with values in [0, 1].
        std: what they are then divided by.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        levels: Levels,
        *,
        classes: int,
        channels: int = 512,
        auxiliary_channels: int = 256,
        short_side: int = 512,
        long_side: int = 2048,
        mode: Literal["whole", "slide"] = "whole",
        crop: int = 512,
        stride: int = 341,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.classes = classes
        self.short_side, self.long_side = short_side, long_side
        self.mode, self.crop, self.stride = mode, crop, stride
        self.decoder = UPerNetDecoder((3, 0, *levels.channels), 5, channels)
        for norm in self.decoder.feature_norms:
            norm.eps = LEVEL_EPS
        self.head = nn.Sequential(nn.Dropout2d(_DROPOUT), nn.Conv2d(channels, classes, 1))
        self.auxiliary = nn.Sequential(
            nn.Conv2d(levels.channels[2], auxiliary_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(auxiliary_channels),
            nn.ReLU(),
            nn.Dropout2d(_DROPOUT),
            nn.Conv2d(auxiliary_channels, classes, 1),
        )
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for part in (self.decoder, self.auxiliary):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        classifiers: list[Any] = [self.head[-1], self.auxiliary[-1]]
        for classifier in classifiers:
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)

    def forward(
        self, images: Tensor | list[Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor] | list[Tensor]:
        if not self.training:
            return [self.segment(image) for image in images]
        assert isinstance(images, Tensor) and labels is not None, "training needs labels"
        maps = self.levels(images)
        logits = self.head(self._decode(maps)).float()
        helper = self.auxiliary(self.decoder.feature_norms[2](maps[2])).float()
        return {
            "main": pixel_loss(logits, labels),
            "auxiliary": _AUXILIARY_WEIGHT * pixel_loss(helper, labels),
        }

    def logits(self, images: Tensor) -> Tensor:
        """(B, classes, H, W) fp32 of a normalised batch."""
        logits = self.head(self._decode(self.levels(images))).float()
        return _resized(logits, images.shape[-2:])

    def segment(self, image: Tensor) -> Tensor:
        """(H, W) int64 classes of one picture (3, H, W) with values in [0, 1]."""
        height, width = image.shape[-2:]
        size = fitted_size(height, width, short=self.short_side, long=self.long_side)
        x = _resized(image[None].float(), size)
        x = (x - self.mean) / self.std
        logits = self._slide(x) if self.mode == "slide" else self.logits(x)
        return _resized(logits, (height, width))[0].argmax(dim=0)

    def _decode(self, maps: list[Tensor]) -> Tensor:
        return self.decoder([maps[0], maps[0], *maps])  # it skips the first two

    def _slide(self, x: Tensor) -> Tensor:
        """Mean logits of the windows over each pixel; the last ones are moved inside."""
        height, width = x.shape[-2:]
        total = x.new_zeros(1, self.classes, height, width)
        times = x.new_zeros(1, 1, height, width)
        for top in _starts(height, self.crop, self.stride):
            for left in _starts(width, self.crop, self.stride):
                rows, columns = slice(top, top + self.crop), slice(left, left + self.crop)
                total[..., rows, columns] += self.logits(x[..., rows, columns])
                times[..., rows, columns] += 1
        return total / times


def _starts(length: int, crop: int, stride: int) -> list[int]:
    last = max(length - crop, 0)
    return sorted({min(start, last) for start in range(0, last + stride, stride)})


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy at the labels' size, over labelled pixels, divided by the number of all."""
    logits = _resized(logits, labels.shape[-2:])
    total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / labels.numel()


def synchronise_norms(model: Segmentor) -> None:
    """Let the BatchNorms of decoder and heads see the batches of all ranks."""
    for name in ("decoder", "head", "auxiliary"):
        part = getattr(model, name)
        setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(part))
