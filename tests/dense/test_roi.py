"""Pooling, mask targets and pasting against float64 transcriptions of the reference."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from l2vit.dense.roi import AlignedPooler, box_losses, mask_loss, mask_targets, paste_masks

STRIDES = (4, 8, 16, 32)


def bilinear(plane, y, x):
    """A value between four pixels; outside by more than a pixel it is zero, as RoIAlign has it."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = max(y, 0.0), max(x, 0.0)
    y0, x0 = min(int(y), height - 1), min(int(x), width - 1)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    y, x = (float(y0) if y0 == height - 1 else y), (float(x0) if x0 == width - 1 else x)
    dy, dx = y - y0, x - x0
    top = plane[y0, x0] * (1 - dx) + plane[y0, x1] * dx
    return top * (1 - dy) + (plane[y1, x0] * (1 - dx) + plane[y1, x1] * dx) * dy


def plain_roi_align(plane, box, bins, stride):
    """Mean of an adaptive number of samples in every bin, pixels' centres at .5."""
    left, top, right, bottom = (v / stride - 0.5 for v in box)
    height, width = (bottom - top) / bins, (right - left) / bins
    rows, columns = max(1, math.ceil(height)), max(1, math.ceil(width))
    out = np.zeros((bins, bins))
    for i in range(bins):
        for j in range(bins):
            samples = [
                bilinear(
                    plane,
                    top + height * (i + (a + 0.5) / rows),
                    left + width * (j + (b + 0.5) / columns),
                )
                for a in range(rows)
                for b in range(columns)
            ]
            out[i, j] = sum(samples) / len(samples)
    return out


BOXES = torch.tensor(
    [
        [8.0, 3.3, 24.7, 40.1],
        [0.0, 0.0, 55.0, 55.0],
        [10.0, 10.0, 122.0, 122.0],  # exactly 112: one level up
        [5.5, 20.0, 250.0, 240.0],
        [0.0, 0.0, 512.0, 500.0],
        [100.0, 90.0, 103.0, 91.5],
    ]
)


def test_pooling_is_aligned_adaptive_and_from_the_right_level():
    generator = torch.Generator().manual_seed(0)
    maps = {
        str(i): torch.randn(2, 1, 512 // s, 512 // s, generator=generator)
        for i, s in enumerate(STRIDES)
    }
    pooled = AlignedPooler(7, STRIDES)(maps, [BOXES[:3], BOXES[3:]], [(512, 512)] * 2)
    for row, box in enumerate(BOXES.tolist()):
        side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3)
        plane = maps[str(level)][row // 3, 0].double().numpy()
        expected = plain_roi_align(plane, box, 7, STRIDES[level])
        np.testing.assert_allclose(pooled[row, 0].numpy(), expected, atol=2e-5)


def test_golden_bins_on_a_ramp():
    """f(x, y) = x at stride 4, a box from 8 to 24: the half pixel is what alignment is about."""
    ramp = torch.arange(16.0).expand(1, 1, 16, 16).contiguous()
    pooled = AlignedPooler(7, (4,))({"0": ramp}, [torch.tensor([[8.0, 8.0, 24.0, 24.0]])])
    expected = 1.5 + (torch.arange(7) + 0.5) * 4 / 7
    torch.testing.assert_close(pooled[0, 0, 3], expected)


def test_the_first_images_size_settles_nothing():
    """torchvision guesses the strides once, from the first image it sees."""
    pooler = AlignedPooler(7, STRIDES)
    tiny = {str(i): torch.zeros(1, 1, 1, 1) for i in range(4)}
    pooler(tiny, [torch.tensor([[0.0, 0.0, 3.0, 3.0]])], [(3, 3)])
    ramp = {str(i): torch.arange(64.0 // 2**i).expand(1, 1, 64, -1) for i in range(4)}
    pooled = pooler(ramp, [torch.tensor([[8.0, 8.0, 24.0, 24.0]])], [(256, 256)])
    assert float(pooled[0, 0, 3, 3]) == pytest.approx(3.5)


def test_no_box_gives_no_row_and_a_gradient():
    maps = {str(i): torch.randn(1, 3, 8, 8, requires_grad=True) for i in range(4)}
    pooled = AlignedPooler(7, STRIDES)(maps, [torch.zeros(0, 4)])
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all(m.grad is not None and not m.grad.any() for m in maps.values())


def test_pooling_is_fp32_whatever_the_maps_are():
    maps = {str(i): torch.randn(1, 3, 64 // 2**i, 64 // 2**i).bfloat16() for i in range(4)}
    pooled = AlignedPooler(7, STRIDES)(maps, [BOXES[:2]])
    assert pooled.dtype == torch.float32


def test_mask_targets_are_hard_and_clipped():
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand(2, 1, 8, 8, generator=generator) > 0.5
    masks = F.interpolate(blocks.float(), size=(56, 64))[:, 0].to(torch.uint8)
    boxes = torch.tensor([[3.2, 5.1, 40.0, 50.7], [-6.0, 10.0, 80.0, 70.0], [1.1, 1.3, 9.2, 9.4]])
    which = torch.tensor([1, 0, 1])
    found = mask_targets(masks, boxes, which, 28)
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    for row, box in enumerate(boxes.tolist()):
        box = [max(box[0], 0), max(box[1], 0), min(box[2], 64), min(box[3], 56)]
        soft = plain_roi_align(masks[which[row]].double().numpy(), box, 28, 1)
        sure = np.abs(soft - 0.5) > 1e-4
        assert sure.mean() > 0.9
        assert (found[row].numpy()[sure] == (soft >= 0.5)[sure]).all()


def test_mask_loss_is_the_mean_over_pixels_of_the_own_class():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 5, 28, 28, generator=generator)
    masks = (torch.rand(2, 40, 40, generator=generator) > 0.5).to(torch.uint8)
    targets = [
        {"labels": torch.tensor([4]), "masks": masks[:1]},
        {"labels": torch.tensor([2]), "masks": masks[1:]},
    ]
    boxes = [torch.tensor([[1.0, 2, 30, 33]]), torch.tensor([[0.0, 0, 20, 20], [5, 5, 39, 39]])]
    which = [torch.tensor([0]), torch.tensor([0, 0])]
    total = 0.0
    wanted = [
        mask_targets(t["masks"], b, w, 28) for t, b, w in zip(targets, boxes, which, strict=True)
    ]
    for row, (label, answer) in enumerate(zip((4, 2, 2), torch.cat(wanted), strict=True)):
        p = torch.sigmoid(logits[row, label].double())
        total += float(-(answer * p.log() + (1 - answer) * (1 - p).log()).sum())
    found = mask_loss(logits, boxes, targets, which)
    assert float(found) == pytest.approx(total / (3 * 28 * 28), rel=1e-6)


def test_box_losses_are_divided_by_all_sampled_boxes():
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(6, 4, generator=generator)
    deltas, wanted = torch.randn(6, 16, generator=generator), torch.randn(6, 4, generator=generator)
    labels = torch.tensor([0, 2, 0, 3, 1, 0])
    cross, box = box_losses(scores, deltas, labels, wanted)
    logs = torch.log_softmax(scores.double(), 1)
    assert float(cross) == pytest.approx(-float(logs[range(6), labels].mean()), rel=1e-6)
    total = 0.0
    for row, label in enumerate(labels.tolist()):
        if label:
            own = deltas[row, 4 * label : 4 * label + 4].double()
            total += float((own - wanted[row].double()).abs().sum())  # L1, not smooth
    assert float(box) == pytest.approx(total / 6, rel=1e-6)


def test_pasting_samples_at_pixel_centres_of_the_exact_box():
    generator = torch.Generator().manual_seed(5)
    masks = torch.rand(3, 1, 28, 28, generator=generator)
    boxes = torch.tensor(
        [[3.4, 2.2, 30.9, 41.3], [-5.0, -2.5, 60.0, 20.25], [10.2, 10.7, 11.9, 13.0]]
    )
    found = paste_masks(masks, boxes, (44, 50))
    assert found.shape == (3, 44, 50) and found.dtype == torch.bool
    for mask, box, answer in zip(masks[:, 0].double().numpy(), boxes.tolist(), found, strict=True):
        padded = np.pad(mask, 1)  # zero outside
        for y in range(44):
            for x in range(50):
                my = (y + 0.5 - box[1]) / (box[3] - box[1]) * 28 - 0.5
                mx = (x + 0.5 - box[0]) / (box[2] - box[0]) * 28 - 0.5
                inside = -1 < my < 28 and -1 < mx < 28
                value = bilinear(padded, my + 1, mx + 1) if inside else 0.0
                if abs(value - 0.5) > 1e-4:
                    assert bool(answer[y, x]) == (value >= 0.5), (y, x, value)


def test_many_masks_are_pasted_in_portions():
    masks, boxes = torch.ones(35, 1, 28, 28), torch.tensor([[2.0, 3.0, 9.0, 8.0]]).repeat(35, 1)
    found = paste_masks(masks, boxes, (12, 12))
    assert found.sum(dim=(1, 2)).tolist() == [35] * 35  # 7 × 5 pixels
    assert paste_masks(masks[:0], boxes[:0], (12, 12)).shape == (0, 12, 12)
