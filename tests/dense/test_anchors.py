"""Anchors and matching against the reference's golden numbers and a plain transcription."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from l2vit.dense.anchors import AnchorMatcher, FixedStrideAnchors
from l2vit.dense.detectors import Fp32RetinaHead, _proposals

A = {
    "boxes": torch.tensor([[10.0, 12, 70, 90], [60, 40, 150, 62]]),
    "labels": torch.tensor([3, 0]),
}
B = {"boxes": torch.tensor([[30.0, 30, 46, 50]]), "labels": torch.tensor([2])}
RETINA, REGION = (8, 16, 32, 64, 128), (4, 8, 16, 32, 64)


def retina_anchors():
    return FixedStrideAnchors([[4 * s * 2 ** (k / 3) for k in range(3)] for s in RETINA], RETINA)


def region_anchors():
    return FixedStrideAnchors([[8 * s] for s in REGION], REGION)


def on_grids(generator, grids, images=2):
    maps = [torch.zeros(1, 1, *(g if isinstance(g, tuple) else (g, g))) for g in grids]
    return generator(SimpleNamespace(image_sizes=[(0, 0)] * images), maps)


def test_golden_anchors_matches_and_losses_of_retinanet():
    anchors = on_grids(retina_anchors(), (20, 10, 5, 3, 2))
    assert anchors[0].shape == (4842, 4) and anchors[0].dtype == torch.float32
    first = torch.tensor([-22.627417, -11.313708, 22.627417, 11.313708])
    torch.testing.assert_close(anchors[0][0], first, atol=1e-6, rtol=0)
    matcher = AnchorMatcher(0.5, 0.4)
    matched = [matcher(box_iou(t["boxes"], a)) for t, a in zip((A, B), anchors, strict=True)]
    counts = [(int((m >= 0).sum()), int((m == -2).sum())) for m in matched]
    assert counts == [(39, 107), (2, 0)]
    outputs = {"cls_logits": torch.zeros(2, 4842, 4), "bbox_regression": torch.zeros(2, 4842, 4)}
    losses = Fp32RetinaHead(8, 9, 4).compute_loss([A, B], outputs, anchors, matched)
    assert float(losses["classification"]) == pytest.approx(121.345116, rel=1e-6)
    assert float(losses["bbox_regression"]) == pytest.approx(0.774793, rel=1e-6)


def test_golden_matches_and_losses_of_region_proposals():
    anchors = on_grids(region_anchors(), (40, 20, 10, 5, 3))
    rpn = _proposals(region_anchors(), 8)
    labels, boxes = rpn.assign_targets_to_anchors(anchors, [A, B])
    counts = [(int((k == 1).sum()), int((k == -1).sum())) for k in labels]
    assert counts == [(5, 277), (12, 22)]
    rpn.fg_bg_sampler.batch_size_per_image = 10**6  # all of them
    total = sum(len(a) for a in anchors)
    deltas = list(rpn.box_coder.encode(boxes, anchors))
    objectness, box = rpn.compute_loss(torch.zeros(total, 1), torch.zeros(total, 4), labels, deltas)
    assert float(objectness) == pytest.approx(0.693147, rel=1e-6)
    assert float(box) == pytest.approx(0.00157867, rel=1e-5)


def test_numbers_of_anchors_at_the_usual_size():
    retina = on_grids(retina_anchors(), ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)), 1)
    region = on_grids(region_anchors(), ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21)), 1)
    assert (len(retina[0]), len(region[0])) == (201_600, 268_569)


def plain_anchors(sizes, strides, grids):
    """The definition, one anchor at a time."""
    rows = []
    for level, stride, (height, width) in zip(sizes, strides, grids, strict=True):
        for y in range(height):
            for x in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    for size in level:
                        w, h = size / ratio**0.5, size * ratio**0.5
                        cx, cy = x * stride, y * stride
                        rows.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    return torch.tensor(rows, dtype=torch.float64)


def test_anchors_keep_strides_and_fractions_where_torchvisions_do_not():
    """Rows 1, 2 and 3 at 416×544, where the grids of P6 and P7 are rounded up."""
    sizes = [[4 * s * 2 ** (k / 3) for k in range(3)] for s in RETINA]
    grids = [(52, 68), (26, 34), (13, 17), (7, 9), (4, 5)]
    ours = on_grids(FixedStrideAnchors(sizes, RETINA), grids, 1)[0]
    torch.testing.assert_close(
        ours.double(), plain_anchors(sizes, RETINA, grids), atol=1e-4, rtol=1e-6
    )
    stock = AnchorGenerator(tuple(map(tuple, sizes)), ((0.5, 1.0, 2.0),) * 5)
    images = SimpleNamespace(image_sizes=[(416, 544)], tensors=torch.zeros(1, 3, 416, 544))
    theirs = stock(images, [torch.zeros(1, 1, *grid) for grid in grids])[0]
    p7 = slice(-4 * 5 * 9, None)
    p6 = slice(-(4 * 5 + 7 * 9) * 9, -4 * 5 * 9)
    assert (ours[p7] - theirs[p7]).abs().max() > 80 and (ours[p6] - theirs[p6]).abs().max() > 30
    p3 = slice(0, 52 * 68 * 9)
    assert 0.1 < (ours[p3] - theirs[p3]).abs().max() < 1.0  # rounding alone


def plain_match(quality, high, low, best_from):
    """The reference's rule, object by object."""
    objects, anchors = len(quality), len(quality[0])
    result = []
    for a in range(anchors):
        best = max(range(objects), key=lambda o: (quality[o][a], -o))
        value = quality[best][a]
        result.append(best if value >= high else -1 if value < low else -2)
    for o in range(objects):
        best = max(quality[o])
        if best >= best_from:
            for a in range(anchors):
                if quality[o][a] == best:
                    result[a] = o
    return result


@pytest.mark.parametrize("best_from", [0.0, 0.3])
def test_matching_is_the_reference_rule(best_from):
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        quality = (torch.rand(4, 25, generator=generator).double() * 10).round() / 10  # ties
        quality *= torch.tensor([1.0, 0.7, 0.25, 0.6], dtype=torch.float64)[:, None]
        quality[quality.max(dim=1).values == 0] = 0.1
        expected = plain_match(quality.tolist(), 0.7, 0.3, best_from)
        assert AnchorMatcher(0.7, 0.3, best_from)(quality).tolist() == expected


def test_an_objects_best_anchor_is_its_own_although_another_covers_it_more():
    quality = torch.tensor([[0.9, 0.1], [0.45, 0.0]])
    assert AnchorMatcher(0.5, 0.4)(quality).tolist() == [1, -1]
