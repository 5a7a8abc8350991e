"""The second half of Mask R-CNN: boxes pooled, classified and refined, and their masks.

Subclasses of torchvision's parts that compute what the reference implementation computes: aligned
pooling with adaptive sampling, L1 for boxes, hard mask targets, masks pasted from exact boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import box_area, clip_boxes_to_image, roi_align

Target = Mapping[str, Tensor]
_FINEST = 56
"""A box of this side and more, up to twice as much, is pooled from the finest level."""
_MASKS_AT_ONCE = 16


class AlignedPooler(nn.Module):
    """Boxes of every image to (boxes, C, size, size), each pooled from the level of its size.

    Args:
        size: bins along each side.
        strides: of the levels boxes are pooled from.
    """

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.size, self.strides = size, list(strides)

    def forward(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Any = None
    ) -> Tensor:
        """Pool in fp32; ``image_shapes`` is not needed, the strides are known."""
        maps = list(features.values())[: len(self.strides)]
        rows = torch.cat(
            [F.pad(b.float(), (1, 0), value=float(image)) for image, b in enumerate(boxes)]
        )
        level = (box_area(rows[:, 1:]).sqrt() / _FINEST + 1e-6).log2().floor()
        level = level.clamp(0, len(maps) - 1)
        pooled = rows.new_zeros(len(rows), maps[0].shape[1], self.size, self.size)
        for number, (feature, stride) in enumerate(zip(maps, self.strides, strict=True)):
            here = torch.where(level == number)[0]
            part = roi_align(
                feature.float(), rows[here], self.size, 1 / stride, sampling_ratio=0, aligned=True
            )
            pooled = pooled.index_put((here,), part)
        return pooled


class AlignedRoIHeads(RoIHeads):
    """torchvision's heads with the reference's losses and pooling, computed in fp32."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """(detections, {}) in evaluation, ([], losses) in training."""
        if self.training:
            assert targets is not None, "training needs targets"
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detections(features, proposals, image_shapes), {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        sampled = self.select_training_samples(proposals, targets)
        proposals, objects, labels, deltas = sampled
        scores, boxes = self._classify(features, proposals)
        loss_classifier, loss_box = box_losses(scores, boxes, torch.cat(labels), torch.cat(deltas))
        positive = [each > 0 for each in labels]
        proposals = [each[keep] for each, keep in zip(proposals, positive, strict=True)]
        objects = [each[keep] for each, keep in zip(objects, positive, strict=True)]
        return {
            "loss_classifier": loss_classifier,
            "loss_box_reg": loss_box,
            "loss_mask": mask_loss(self._masks(features, proposals), proposals, targets, objects),
        }

    def _detections(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        scores, deltas = self._classify(features, proposals)
        found = self.postprocess_detections(scores, deltas, proposals, image_shapes)
        boxes, confidences, labels = found
        masks = maskrcnn_inference(self._masks(features, boxes), labels)
        return [
            {"boxes": b, "labels": k, "scores": s, "masks": m}
            for b, k, s, m in zip(boxes, labels, confidences, masks, strict=True)
        ]

    def _classify(self, features: dict[str, Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        pooled = self.box_roi_pool(features, boxes)
        scores, deltas = self.box_predictor(self.box_head(_as_weights(pooled, self.box_head)))
        return scores.float(), deltas.float()

    def _masks(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        pooled = self.mask_roi_pool(features, boxes)
        return self.mask_predictor(self.mask_head(_as_weights(pooled, self.mask_head))).float()


def _as_weights(x: Tensor, module: nn.Module) -> Tensor:
    return x.to(next(module.parameters()).dtype)


def box_losses(
    scores: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross entropy and L1 of sampled boxes, both divided by their number.

    Args:
        scores: (boxes, classes), class 0 the background.
        deltas: (boxes, 4 · classes).
        labels: (boxes,).
        wanted: (boxes, 4) deltas to the matched objects.
    """
    positive = torch.where(labels > 0)[0]
    own = deltas.view(len(labels), -1, 4)[positive, labels[positive]]
    box_loss = F.l1_loss(own, wanted[positive], reduction="sum") / max(1, len(labels))
    return F.cross_entropy(scores, labels), box_loss


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, size: int) -> Tensor:
    """(boxes, size, size) fp32 zeros and ones: what each box holds of its object's mask.

    Args:
        masks: (objects, H, W) of one image.
        boxes: (boxes, 4).
        objects: (boxes,) which mask belongs to each box.
        size: of the mask head's answers.
    """
    boxes = clip_boxes_to_image(boxes.float(), masks.shape[-2:])
    rows = torch.cat([objects[:, None].to(boxes), boxes], dim=1)
    pooled = roi_align(masks[:, None].float(), rows, size, 1.0, sampling_ratio=0, aligned=True)
    return (pooled[:, 0] >= 0.5).float()


def mask_loss(
    logits: Tensor, boxes: list[Tensor], targets: Sequence[Target], objects: list[Tensor]
) -> Tensor:
    """Mean binary cross entropy of the masks of each box's own class; 0 if there is no box."""
    if not len(logits):
        return logits.sum() * 0
    each = list(zip(targets, objects, boxes, strict=True))
    labels = torch.cat([target["labels"][which] for target, which, _ in each])
    wanted = torch.cat([mask_targets(t["masks"], b, o, logits.shape[-1]) for t, o, b in each])
    rows = torch.arange(len(labels), device=labels.device)
    return F.binary_cross_entropy_with_logits(logits[rows, labels], wanted)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool: masks (N, 1, m, m) of probabilities, sampled at the pixels' centres.

    Args:
        masks: what each box holds.
        boxes: (N, 4) in pixels of the picture; not rounded.
        size: (H, W) of the picture.
    """
    height, width = size
    pasted = [masks.new_zeros((0, height, width), dtype=torch.bool)]
    y = torch.arange(height, device=boxes.device) + 0.5
    x = torch.arange(width, device=boxes.device) + 0.5
    for part, box in zip(masks.split(_MASKS_AT_ONCE), boxes.split(_MASKS_AT_ONCE), strict=True):
        left, top, right, bottom = box.unbind(1)
        across = (x - left[:, None]) / (right - left)[:, None] * 2 - 1
        down = (y - top[:, None]) / (bottom - top)[:, None] * 2 - 1
        shape = (len(box), height, width)
        grid = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], -1)
        pasted.append(F.grid_sample(part, grid, align_corners=False)[:, 0] >= 0.5)
    return torch.cat(pasted)
