"""Training pictures: the laws of sizes and crops, and arithmetic against plain loops."""

import colorsys

import numpy as np
import pytest
import torch

from l2vit.dense import transforms
from l2vit.dense.config import DetectAugmentConfig, SegmentAugmentConfig
from l2vit.dense.draws import Draws
from l2vit.dense.sizes import fitted_size
from l2vit.dense.transforms import IGNORED, detection_picture, segmentation_picture


@pytest.mark.parametrize(
    ("size", "expected"),
    [((427, 640), (800, 1199)), ((640, 427), (1199, 800)), ((300, 900), (444, 1333))],
)
def test_sizes_meet_one_limit_and_keep_the_shape(size, expected):
    assert fitted_size(*size, short=800, long=1333) == expected


def test_resizing_does_not_smooth_before_shrinking():
    picture = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    found = transforms.resized(picture, (17, 23))
    x = picture.double().numpy()
    for y in range(17):
        for column in range(23):
            sy = min(max((y + 0.5) * 40 / 17 - 0.5, 0), 39)
            sx = min(max((column + 0.5) * 60 / 23 - 0.5, 0), 59)
            y0, x0 = int(sy), int(sx)
            y1, x1, dy, dx = min(y0 + 1, 39), min(x0 + 1, 59), sy - y0, sx - x0
            top = x[:, y0, x0] * (1 - dx) + x[:, y0, x1] * dx
            bottom = x[:, y1, x0] * (1 - dx) + x[:, y1, x1] * dx
            expected = top * (1 - dy) + bottom * dy
            assert np.abs(found[:, y, column].numpy() - expected).max() < 0.51


def scene(height=300, width=400):
    """One object as a rectangle with its mask, another in a corner."""
    boxes = torch.tensor([[120.0, 90, 260, 210], [0, 0, 20, 30]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    picture[:, 90:210, 120:260] = 200
    return picture, {"boxes": boxes, "labels": torch.tensor([7, 3]), "masks": masks}


def test_detection_pictures_follow_the_recipe():
    augment = DetectAugmentConfig()
    shorts, cropped, flipped = [], 0, 0
    for number in range(300):
        picture, target = scene()
        found, answer = detection_picture(picture, target, augment, Draws("d", 0, 0, number))
        height, width = answer["size"]
        assert found.shape == (3, height, width) and found.dtype == torch.uint8
        assert max(height, width) <= 1333
        shorts.append(min(height, width))
        cropped += height / width != pytest.approx(3 / 4, abs=0.003)
        assert len(answer["boxes"]) == len(answer["labels"]) == len(answer["masks"])
        for box, mask in zip(answer["boxes"].tolist(), answer["masks"], strict=True):
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            drawn = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert all(abs(a - int(b)) < 3 for a, b in zip(box, drawn, strict=True))
        if 7 in answer["labels"].tolist():
            left, top, right, bottom = (int(v) for v in answer["boxes"][0])
            assert int(found[0, (top + bottom) // 2, (left + right) // 2]) == 200
        small = (answer["labels"] == 3).nonzero()
        if len(small) and width > 500:
            flipped += float(answer["boxes"][small[0, 0], 0]) > width / 2
    allowed = set(range(480, 801, 32))
    exact = [s for s in shorts if s in allowed]
    assert len(exact) > 0.95 * len(shorts) and set(exact) == allowed
    assert 90 < cropped < 160 and flipped > 60


def test_crops_have_whole_sizes_between_the_limits():
    heights = []
    for number in range(400):
        picture = torch.zeros(3, 500, 900, dtype=torch.uint8)
        target = {"boxes": torch.tensor([[0.0, 0, 900, 500]]), "labels": torch.tensor([1])}
        found, answer = transforms._cropped(picture, target, (384, 600), Draws("c", 0, 0, number))
        height, width = found.shape[-2:]
        assert 384 <= height <= 500 and 384 <= width <= 600
        assert answer["boxes"].tolist() == [[0, 0, width, height]]
        heights.append(height)
    assert len(set(heights)) > 80 and min(heights) < 390 and max(heights) > 494


def test_a_crop_without_objects_is_kept():
    picture = torch.zeros(3, 500, 900, dtype=torch.uint8)
    target = {
        "boxes": torch.tensor([[0.0, 0, 1, 1]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 500, 900, dtype=torch.uint8),
    }
    for number in range(20):
        _, answer = detection_picture(
            picture, target, DetectAugmentConfig(crop=1.0, flip=0.0), Draws("e", 1, 0, number)
        )
        if not len(answer["boxes"]):
            height, width = answer["size"]
            assert answer["boxes"].shape == (0, 4) and answer["masks"].shape == (0, height, width)
            return
    raise AssertionError("no crop missed the corner")


def test_batches_are_padded_with_zeros_after_normalisation():
    pictures = [torch.full((3, 50, 70), 255, dtype=torch.uint8), torch.zeros(3, 60, 40).byte()]
    batch = transforms.padded_batch(pictures, (0.5, 0.4, 0.3), (0.1, 0.2, 0.5))
    assert batch.shape == (2, 3, 64, 96)
    assert batch[0, :, 49, 69].tolist() == pytest.approx([5.0, 3.0, 1.4])
    assert batch[1, :, 0, 0].tolist() == pytest.approx([-5.0, -2.0, -0.6])
    assert not batch[0, :, 50:].any() and not batch[1, :, :, 40:].any()


def stripes(height=300, width=500):
    labels = torch.zeros(height, width, dtype=torch.uint8)
    labels[:, width // 2 :] = 1
    picture = torch.stack([labels * 200, labels * 0 + 50, labels * 100])
    return picture, labels


def test_segmentation_pictures_follow_the_recipe():
    augment = SegmentAugmentConfig(colour=False)
    flips = 0
    for number in range(60):
        found, labels = segmentation_picture(*stripes(), augment, Draws("s", 0, 0, number))
        assert found.shape[1:] == labels.shape and max(labels.shape) <= 512
        ratio = Draws("s", 0, 0, number).between(0.5, 2)
        full = fitted_size(300, 500, short=int(512 * ratio), long=int(2048 * ratio))
        assert labels.shape == (min(512, full[0]), min(512, full[1]))
        away = (found[0].int() - 200 * labels.int()).abs()
        assert float((away > 100).float().mean()) < 0.01  # picture and labels move together
        flips += int(labels[0, 0]) == 1
    assert flips > 10


def test_crops_are_redrawn_while_one_class_fills_them():
    """The border between two classes is rarely in the first crop of a wide picture."""
    augment = SegmentAugmentConfig(colour=False, flip=0.0, scale=(1.0, 1.0), crop=64)
    labels = torch.zeros(512, 1024, dtype=torch.uint8)
    labels[:, 512:] = 1
    picture = torch.zeros(3, 512, 1024, dtype=torch.uint8)
    varied = 0
    for number in range(200):
        _, found = segmentation_picture(picture, labels, augment, Draws("r", 0, 0, number))
        share = float(found.float().mean())
        varied += 0.25 < share < 0.75
    once = 32 / 961  # places of the left edge with the border in the middle half
    expected = 200 * (1 - (1 - once) ** 11)
    assert abs(varied - expected) < 30


def test_ignored_pixels_do_not_count_as_a_class():
    labels = torch.full((8, 8), IGNORED, dtype=torch.uint8)
    assert not transforms._is_varied(labels, 0.75)
    labels[:4] = 2
    assert not transforms._is_varied(labels, 0.75)
    labels[0] = 3
    assert not transforms._is_varied(labels, 0.75)  # exactly three quarters
    labels[1, 0] = 3
    assert transforms._is_varied(labels, 0.75)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.4])
def test_saturation_is_that_of_the_hsv_model(factor):
    picture = torch.randint(0, 256, (3, 6, 6), dtype=torch.uint8)
    found = transforms.saturated(picture, factor)
    for y in range(6):
        for x in range(6):
            h, s, v = colorsys.rgb_to_hsv(*(picture[:, y, x] / 255).tolist())
            expected = np.array(colorsys.hsv_to_rgb(h, min(1, s * factor), v)) * 255
            assert np.abs(found[:, y, x].numpy() - expected).max() < 0.51


def test_colours_change_half_the_time_each_and_never_swap_channels():
    picture = torch.tensor([120, 80, 40], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    same, orders = 0, set()
    for number in range(400):
        found = transforms.changed_colours(picture.contiguous(), Draws("k", 0, 0, number))
        assert found.dtype == torch.uint8
        same += torch.equal(found, picture)
        orders.add(tuple(found[:, 0, 0].argsort().tolist()))
    assert 10 < same < 45  # 400 / 16
    assert (0, 1, 2) not in orders and (2, 1, 0) in orders  # a tenth of a turn swaps no two ends


def test_draws_depend_on_seed_epoch_and_picture_alone():
    def first(*key):
        draws = Draws("x", *key)
        return [draws.between(0, 1) for _ in range(150)]

    assert first(1, 2, 3) == first(1, 2, 3)
    assert len({tuple(first(*key)) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))}) == 4
    draws = Draws("x", 0, 0, 0)
    assert {draws.whole(2, 5) for _ in range(200)} == {2, 3, 4, 5}
    assert {draws.whole(-2, 1) for _ in range(200)} == {-2, -1, 0, 1}
