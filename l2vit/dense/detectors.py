"""RetinaNet and Mask R-CNN of torchvision, made to compute what the reference computes.

The layers are torchvision's. What differs from it are anchors and matching (``anchors.py``), the
losses and their denominators, pooling and masks (``roi.py``), fp32 from the heads' outputs on, and
the initial weights. docs/dense.md lists every difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import (
    FeaturePyramidNetwork,
    batched_nms,
    clip_boxes_to_image,
    sigmoid_focal_loss,
)
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from l2vit.data.config import IMAGENET_MEAN, IMAGENET_STD
from l2vit.dense.anchors import AnchorMatcher, FixedStrideAnchors
from l2vit.dense.levels import Levels
from l2vit.dense.roi import AlignedPooler, AlignedRoIHeads, paste_masks
from l2vit.dense.sizes import fitted_size

DETECTIONS = 100
"""Most detections in one picture."""
_PYRAMID_STRIDES = (4, 8, 16, 32)


class DetectionTransform(GeneralizedRCNNTransform):
    """In evaluation: resizes, normalises and batches pictures, and brings boxes back.

    Training batches come normalised and padded, with each picture's own size in its target.
    """

    def __init__(self, short: int, long: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(short, long, list(mean), list(std))

    def forward(
        self, images: Any, targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Pictures, a batch in training and a list in evaluation, as the backbone takes them."""
        if not self.training:
            return super().forward(images, None)
        assert targets is not None, "training needs targets"
        sizes: Any = [target["size"] for target in targets]
        return ImageList(images, sizes), targets

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """``image`` (3, H, W) as the network sees it."""
        size = fitted_size(*image.shape[-2:], short=self.min_size[-1], long=self.max_size)
        image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Boxes, and masks (N, H, W) bool, in pixels of the pictures that came in."""
        if self.training:
            return result
        for found, shape, original in zip(result, image_shapes, original_image_sizes, strict=True):
            found["boxes"] = resize_boxes(found["boxes"], list(shape), list(original))
            if "masks" in found:
                found["masks"] = paste_masks(found["masks"], found["boxes"], original)
        return result


class TwoCoarserLevels(ExtraFPNBlock):
    """P6 from the backbone's last map, P7 from P6: 3×3 convolutions of stride 2, no ReLU."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, out, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out, out, 3, stride=2, padding=1)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class Pyramid(nn.Module):
    """Images to a dictionary of maps of ``out_channels`` channels, finest first."""

    def __init__(self, levels: Levels, channels: int, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.levels = levels
        self.fpn = FeaturePyramidNetwork(levels.channels, channels, extra)
        self.out_channels = channels
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): x for i, x in enumerate(self.levels(images))})


class Fp32RetinaHead(RetinaNetHead):
    """RetinaNet's head with fp32 answers and one denominator for the batch of a rank."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: answer.float() for name, answer in super().forward(x).items()}

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Sums over all images, divided by all positive anchors, at least 1 for each image."""
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        focal, boxes, positives = logits.sum() * 0, deltas.sum() * 0, 0
        coder = self.regression_head.box_coder
        for image, (target, matched) in enumerate(zip(targets, matched_idxs, strict=True)):
            positive = torch.where(matched >= 0)[0]
            counted = matched != AnchorMatcher.BETWEEN_THRESHOLDS
            wanted = torch.zeros_like(logits[image])
            wanted[positive, target["labels"][matched[positive]]] = 1
            focal = focal + sigmoid_focal_loss(
                logits[image][counted], wanted[counted], reduction="sum"
            )
            to = coder.encode_single(target["boxes"][matched[positive]], anchors[image][positive])
            boxes = boxes + F.l1_loss(deltas[image][positive], to, reduction="sum")
            positives += max(1, len(positive))
        return {"classification": focal / positives, "bbox_regression": boxes / positives}


class ReferenceRetinaNet(RetinaNet):
    """RetinaNet that drops boxes without area before it compares the rest."""

    first_label = 0
    """Label of the first class."""

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """The best detections of each image, in pixels of the resized image."""
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        found = []
        for image, shape in enumerate(image_shapes):
            levels = zip(logits, deltas, anchors[image], strict=True)
            parts = [self._best(k[image], d[image], a, shape) for k, d, a in levels]
            boxes, scores, labels = (torch.cat(part) for part in zip(*parts, strict=True))
            keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
            keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            found.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
        return found

    def _best(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of one level's highest scores."""
        scores = logits.sigmoid().flatten()
        above = torch.where(scores > self.score_thresh)[0]
        scores, order = scores[above].topk(min(self.topk_candidates, len(above)))
        chosen, classes = above[order], logits.shape[-1]
        place = chosen // classes
        boxes = self.box_coder.decode_single(deltas[place], anchors[place])
        return clip_boxes_to_image(boxes, shape), scores, chosen % classes


class Fp32RPNHead(RPNHead):
    """The region proposal head with fp32 answers."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [s.float() for s in scores], [d.float() for d in deltas]


class ReferenceRPN(RegionProposalNetwork):
    """Region proposals with L1 for boxes, divided by all sampled anchors."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """(objectness loss, box loss) of sampled anchors."""
        chosen = self.fg_bg_sampler(labels)
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in chosen)
        sampled = torch.cat([positive, negative])
        wanted, is_object = torch.cat(regression_targets), torch.cat(labels)
        box_loss = F.l1_loss(pred_bbox_deltas[positive], wanted[positive], reduction="sum")
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], is_object[sampled]
        )
        return objectness_loss, box_loss / len(sampled)


class ReferenceMaskRCNN(GeneralizedRCNN):
    """Mask R-CNN of the parts given."""

    first_label = 1
    """Label of the first class; 0 is the background."""


def retinanet(
    levels: Levels,
    *,
    classes: int,
    channels: int = 256,
    short_side: int = 800,
    long_side: int = 1333,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> RetinaNet:
    """RetinaNet over three levels of strides 8, 16 and 32; labels are 0 to ``classes`` − 1.

    Args:
        levels: the backbone.
        classes: outputs, no background among them.
        channels: of the feature pyramid and the heads.
        short_side: of pictures in evaluation, at most.
        long_side: of pictures in evaluation, at most.
        mean: subtracted from pictures with values in [0, 1].
        std: what they are then divided by.
    """
    strides = [*levels.strides, 2 * levels.strides[-1], 4 * levels.strides[-1]]
    sizes = [[4 * stride * 2 ** (k / 3) for k in range(3)] for stride in strides]
    anchors = FixedStrideAnchors(sizes, strides)
    model = ReferenceRetinaNet(
        Pyramid(levels, channels, TwoCoarserLevels(levels.channels[-1], channels)),
        classes,
        anchor_generator=anchors,
        head=Fp32RetinaHead(channels, anchors.num_anchors_per_location()[0], classes),
        proposal_matcher=AnchorMatcher(0.5, 0.4),
        detections_per_img=DETECTIONS,
    )
    model.transform = DetectionTransform(short_side, long_side, mean, std)
    return model


def mask_rcnn(
    levels: Levels,
    *,
    classes: int,
    channels: int = 256,
    box_width: int = 1024,
    mask_convs: int = 4,
    short_side: int = 800,
    long_side: int = 1333,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> GeneralizedRCNN:
    """Mask R-CNN over four levels; labels are 1 to ``classes``, 0 is the background.

    Args:
        levels: the backbone, all four stages.
        classes: kinds of objects.
        channels: of the feature pyramid and the mask head.
        box_width: of the box head's two linear layers.
        mask_convs: 3×3 convolutions of the mask head.
        short_side: see :func:`retinanet`; so are the arguments after it.
        long_side: see :func:`retinanet`.
        mean: see :func:`retinanet`.
        std: see :func:`retinanet`.
    """
    strides = [*levels.strides, 2 * levels.strides[-1]]
    anchors = FixedStrideAnchors([[8 * stride] for stride in strides], strides)
    return ReferenceMaskRCNN(
        Pyramid(levels, channels, LastLevelMaxPool()),
        _proposals(anchors, channels),
        _heads(classes + 1, channels, box_width, mask_convs),
        DetectionTransform(short_side, long_side, mean, std),
    )


def _proposals(anchors: FixedStrideAnchors, channels: int) -> RegionProposalNetwork:
    rpn = ReferenceRPN(
        anchors,
        Fp32RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 1000, "testing": 1000},
        nms_thresh=0.7,
    )
    matcher: Any = AnchorMatcher(0.7, 0.3, best_from=0.3)
    rpn.proposal_matcher = matcher
    return rpn


def _heads(outputs: int, channels: int, box_width: int, mask_convs: int) -> AlignedRoIHeads:
    box_head = TwoMLPHead(channels * 7 * 7, box_width)
    predictor = FastRCNNPredictor(box_width, outputs)
    for layer in (box_head.fc6, box_head.fc7):
        nn.init.xavier_uniform_(layer.weight)
    nn.init.normal_(predictor.cls_score.weight, std=0.01)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
    for layer in (box_head.fc6, box_head.fc7, predictor.cls_score, predictor.bbox_pred):
        nn.init.zeros_(layer.bias)
    return AlignedRoIHeads(
        AlignedPooler(7, _PYRAMID_STRIDES),
        box_head,
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=DETECTIONS,
        mask_roi_pool=AlignedPooler(14, _PYRAMID_STRIDES),
        mask_head=MaskRCNNHeads(channels, (channels,) * mask_convs, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, outputs),
    )
