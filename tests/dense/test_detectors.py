"""torchvision's detectors, changed: losses, inference and fp32 against float64 transcriptions."""

import math

import pytest
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou

from l2vit.dense import detectors
from l2vit.dense.anchors import AnchorMatcher
from l2vit.dense.levels import Levels, make_levels

SIZE = (96, 128)


class Body(nn.Module):
    """Four strided convolutions that look like timm's ``features_only``."""

    def __init__(self, stages=(0, 1, 2, 3)):
        super().__init__()
        self.stages = stages
        self.convs = nn.ModuleList(
            [nn.Conv2d(3, 8, 4, 4), *(nn.Conv2d(8, 8, 2, 2) for _ in range(3))]
        )
        info = {"channels": [8] * len(stages), "reduction": [4 << s for s in stages]}
        self.feature_info = type("Info", (), {k: (lambda s, v=v: v) for k, v in info.items()})()

    def forward(self, x):
        maps = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return [maps[stage] for stage in self.stages]


def small_retinanet(classes=4):
    torch.manual_seed(0)
    return detectors.retinanet(Levels(Body((1, 2, 3))), classes=classes, channels=16)


def small_mask_rcnn(classes=4):
    torch.manual_seed(0)
    return detectors.mask_rcnn(Levels(Body()), classes=classes, channels=16, box_width=32)


def target(boxes, labels, size=SIZE):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    labels = torch.tensor(labels, dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "masks": masks, "size": size}


TARGETS = [
    target([[10, 12, 70, 90], [60, 40, 120, 62]], [3, 1]),
    target([[30, 30, 46, 50]], [2]),
]
NOTHING = [target([], []), target([], [])]


def encode(box, anchor):
    """Deltas from an anchor to a box, in plain numbers."""
    aw, ah = anchor[2] - anchor[0], anchor[3] - anchor[1]
    bw, bh = box[2] - box[0], box[3] - box[1]
    ax, ay, bx, by = anchor[0] + aw / 2, anchor[1] + ah / 2, box[0] + bw / 2, box[1] + bh / 2
    return [(bx - ax) / aw, (by - ay) / ah, math.log(bw / aw), math.log(bh / ah)]


def test_retinanet_losses_are_sums_over_the_batch():
    """Row 5: one denominator, the positives of all images, each image counted at least once."""
    generator = torch.Generator().manual_seed(1)
    model = small_retinanet()
    anchors = torch.rand(40, 4, generator=generator) * 60
    anchors[:, 2:] += anchors[:, :2] + 20
    logits = torch.randn(3, 40, 4, generator=generator)
    deltas = torch.randn(3, 40, 4, generator=generator)
    targets = [*TARGETS, NOTHING[0]]
    focal = boxes = positives = 0.0
    for image, each in enumerate(targets):
        matched = torch.full((40,), -1)
        if len(each["boxes"]):
            matched = AnchorMatcher(0.5, 0.4)(box_iou(each["boxes"], anchors))
        for a, owner in enumerate(matched.tolist()):
            if owner == -2:
                continue
            for k in range(4):
                p = torch.sigmoid(logits[image, a, k].double()).item()
                if owner >= 0 and int(each["labels"][owner]) == k:
                    focal -= 0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    focal -= 0.75 * p**2 * math.log(1 - p)
            if owner >= 0:
                wanted = encode(each["boxes"][owner].tolist(), anchors[a].double().tolist())
                found = deltas[image, a].double().tolist()
                boxes += sum(abs(f - w) for f, w in zip(found, wanted, strict=True))
        positives += max(1, int((matched >= 0).sum()))
    outputs = {"cls_logits": logits, "bbox_regression": deltas}
    losses = model.compute_loss(targets, outputs, [anchors] * 3)
    assert float(losses["classification"]) == pytest.approx(focal / positives, rel=1e-6)
    assert float(losses["bbox_regression"]) == pytest.approx(boxes / positives, rel=1e-5)


def test_region_box_loss_is_l1_over_all_sampled_anchors():
    """Row 7."""
    rpn = small_mask_rcnn().rpn
    deltas, wanted = torch.randn(6, 4), torch.randn(6, 4)
    labels = torch.tensor([1.0, 0, -1, 0, 1, 0])
    objectness, box = rpn.compute_loss(torch.zeros(6, 1), deltas, [labels], [wanted])
    total = sum((deltas[i].double() - wanted[i].double()).abs().sum() for i in (0, 4))
    assert float(box) == pytest.approx(float(total) / 5, rel=1e-6)
    assert float(objectness) == pytest.approx(math.log(2), rel=1e-6)


def test_p6_comes_from_the_backbones_last_map_and_p7_has_no_relu():
    """Row 4."""
    model = small_retinanet()
    maps = model.backbone.levels(torch.randn(1, 3, *SIZE))
    features = model.backbone(torch.randn(1, 3, *SIZE))
    features = list(model.backbone.fpn({str(i): m for i, m in enumerate(maps)}).values())
    extra = model.backbone.fpn.extra_blocks
    p6 = nn.functional.conv2d(maps[-1], extra.p6.weight, extra.p6.bias, stride=2, padding=1)
    assert (p6 < 0).any()
    torch.testing.assert_close(features[3], p6)
    p7 = nn.functional.conv2d(p6, extra.p7.weight, extra.p7.bias, stride=2, padding=1)
    torch.testing.assert_close(features[4], p7)


def plain_detections(model, logits, deltas, anchors, shape):
    """Threshold, decode, clip, drop empty boxes, suppress within classes, keep the best 100."""
    found = []
    for k, d, a in zip(logits, deltas, anchors, strict=True):
        scores = torch.sigmoid(k)
        chosen = [(float(scores[i, c]), i, c) for i, c in (scores > 0.05).nonzero().tolist()]
        for score, i, c in sorted(chosen, key=lambda item: -item[0])[:1000]:
            aw, ah = a[i, 2] - a[i, 0], a[i, 3] - a[i, 1]
            cx = a[i, 0] + aw / 2 + d[i, 0] * aw
            cy = a[i, 1] + ah / 2 + d[i, 1] * ah
            w, h = aw * math.exp(min(d[i, 2], 4.135)), ah * math.exp(min(d[i, 3], 4.135))
            box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            box = [min(max(float(v), 0), shape[1 - n % 2]) for n, v in enumerate(box)]
            if box[2] > box[0] and box[3] > box[1]:
                found.append((score, c, box))
    found.sort(key=lambda item: -item[0])
    kept = []
    for score, c, box in found:
        rivals = [torch.tensor(b) for _, k, b in kept if k == c]
        if rivals and box_iou(torch.tensor([box]), torch.stack(rivals)).max() > 0.5:
            continue
        kept.append((score, c, box))
    return kept[:100]


def test_retinanet_inference_is_the_reference_procedure():
    """Rows 11 and 12; half of the anchors lie outside, so many boxes lose their area."""
    generator = torch.Generator().manual_seed(7)
    model = small_retinanet()
    anchors, logits, deltas = [], [], []
    for count in (120, 60):
        corner = torch.rand(count, 2, generator=generator).double() * 200 - 50
        anchors.append(torch.cat([corner, corner + 30], dim=1))
        logits.append(torch.randn(count, 4, generator=generator).double() - 1)
        deltas.append(torch.randn(count, 4, generator=generator).double() * 0.3)
    expected = plain_detections(model, logits, deltas, anchors, SIZE)
    outputs = {
        "cls_logits": [k[None].float() for k in logits],
        "bbox_regression": [d[None].float() for d in deltas],
    }
    [found] = model.postprocess_detections(outputs, [[a.float() for a in anchors]], [SIZE])
    assert len(expected) == len(found["scores"]) == 100
    assert found["labels"].tolist() == [c for _, c, _ in expected]
    scores = torch.tensor([s for s, _, _ in expected])
    torch.testing.assert_close(found["scores"], scores, atol=1e-6, rtol=0)
    boxes = torch.tensor([b for _, _, b in expected])
    torch.testing.assert_close(found["boxes"], boxes, atol=1e-3, rtol=0)


def test_numbers_of_candidates_are_the_references():
    """Row 11."""
    retina, mask = small_retinanet(), small_mask_rcnn()
    assert (retina.detections_per_img, retina.topk_candidates) == (100, 1000)
    assert (retina.score_thresh, retina.nms_thresh) == (0.05, 0.5)
    rpn, heads = mask.rpn, mask.roi_heads
    assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (
        256,
        0.5,
    )
    sampler = heads.fg_bg_sampler
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (512, 0.25)
    assert heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0) and heads.detections_per_img == 100


def test_bf16_networks_decode_in_fp32():
    """Row 13: at x ≈ 1200 bf16 steps by 8 pixels."""
    model = small_retinanet().to(torch.bfloat16).eval()
    model.head.classification_head.cls_logits.weight.data.zero_()
    images = torch.randn(1, 3, 96, 1280)
    features = list(model.backbone(images).values())
    outputs = model.head(features)
    assert {o.dtype for o in outputs.values()} == {torch.float32}
    anchors = model.anchor_generator(type("I", (), {"image_sizes": [(96, 1280)]}), features)[0]
    assert anchors.dtype == torch.float32
    deltas = outputs["bbox_regression"][0]
    boxes = model.box_coder.decode_single(deltas, anchors)
    for row in (anchors[:, 0] - 1200).abs().topk(5, largest=False).indices.tolist():
        anchor, delta = anchors[row].double().tolist(), deltas[row].double().tolist()
        width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
        x, w = anchor[0] + width / 2 + delta[0] * width, width * math.exp(delta[2])
        y, h = anchor[1] + height / 2 + delta[1] * height, height * math.exp(delta[3])
        plain = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        torch.testing.assert_close(boxes[row], plain, atol=0.01, rtol=0)


@pytest.mark.parametrize("make", [small_retinanet, small_mask_rcnn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [TARGETS, NOTHING], ids=["objects", "no object"])
def test_every_parameter_has_a_gradient(make, dtype, targets):
    """Ranks without an object must take part in every reduction."""
    model = make(classes=4).to(dtype).train()
    losses = model(torch.randn(2, 3, *SIZE), targets)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_mask_rcnn_detects_in_the_pictures_own_pixels():
    model = small_mask_rcnn().eval()
    model.roi_heads.score_thresh = 0.0
    pictures = [torch.rand(3, 60, 90), torch.rand(3, 90, 60)]
    found = model(pictures)
    for each, picture in zip(found, pictures, strict=True):
        count, (height, width) = len(each["boxes"]), picture.shape[-2:]
        assert count == 100 and (each["labels"] > 0).all()
        assert each["masks"].shape == (count, height, width)
        assert (
            each["boxes"].min() >= 0
            and (each["boxes"].amax(0)[2:] <= torch.tensor([width, height])).all()
        )


def test_pictures_keep_their_shape_in_evaluation():
    """427×640 becomes 800×1199: half a pixel is rounded up, where torchvision rounds down."""
    transform = detectors.DetectionTransform(800, 1333, (0, 0, 0), (1, 1, 1)).eval()
    images, _ = transform([torch.rand(3, 427, 640)])
    assert images.image_sizes == [(800, 1199)] and images.tensors.shape[-2:] == (800, 1216)
    wide, _ = transform([torch.rand(3, 300, 900)])
    assert wide.image_sizes == [(444, 1333)]
    stock = GeneralizedRCNNTransform(800, 1333, [0, 0, 0], [1, 1, 1]).eval()
    assert abs(stock([torch.rand(3, 427, 640)])[0].image_sizes[0][1] - 1199) <= 1


def test_initial_weights():
    """Row 14, and the prior of 0.01."""
    mask = detectors.mask_rcnn(Levels(Body()), classes=80, channels=64, box_width=256)
    heads = mask.roi_heads
    fc6 = heads.box_head.fc6.weight.detach()
    bound = math.sqrt(6 / (fc6.shape[0] + fc6.shape[1]))
    assert float(fc6.abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(heads.box_predictor.cls_score.weight.detach().std()) == pytest.approx(
        0.01, rel=0.05
    )
    assert float(heads.box_predictor.bbox_pred.weight.detach().std()) == pytest.approx(
        0.001, rel=0.05
    )
    inner = mask.backbone.fpn.layer_blocks[0][0].weight.detach()
    bound = math.sqrt(6 / (2 * 64 * 9))
    assert float(inner.abs().max()) == pytest.approx(bound, rel=1e-3)
    retina = detectors.retinanet(Levels(Body((1, 2, 3))), classes=80, channels=64)
    head = retina.head.classification_head
    assert float(head.cls_logits.bias[0].detach().sigmoid()) == pytest.approx(0.01)
    assert float(head.cls_logits.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    p6 = retina.backbone.fpn.extra_blocks.p6.weight.detach()
    assert float(p6.abs().max()) == pytest.approx(math.sqrt(6 / ((8 + 64) * 9)), rel=1e-2)


def test_levels_are_normalised_stages():
    levels = make_levels("l2vit_mini", stages=(1, 2, 3)).eval()
    maps = levels(torch.randn(1, 3, 64, 96))
    assert [m.shape[1:] for m in maps] == [(64, 8, 12), (128, 4, 6), (256, 2, 3)]
    for x in maps:
        assert x.mean(1).abs().max() < 1e-4 and (x.var(1, correction=0) - 1).abs().max() < 1e-2
    top = {name.split(".")[1] for name in levels.body.state_dict()}
    assert top == {"stem", "stages"}  # neither classifier nor final norm
    assert {n.eps for n in levels.norms} == {1e-5}


def test_recomputing_reaches_the_model_under_the_wrapper():
    levels = make_levels("l2vit_mini", stages=(2, 3), grad_checkpointing=True)
    assert levels.body.model.stages[0].grad_checkpointing
