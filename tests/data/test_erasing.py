"""Erasing noise against its formula in whole numbers of any size, and as a distribution."""

import statistics

import numpy as np
import pytest
import torch
from scipy import stats

from l2vit.data import erasing
from l2vit.data.augment import erase_noise
from l2vit.data.batch import BatchPlan, DecodedBatch, Normalizer
from l2vit.data.config import AugmentConfig

SIDE = 24
KEYS = np.array([5, 2**52 + 12345, 7, 2**53 - 1], np.uint64)
BOXES = np.array([[2, 3, 4, 5], [0, 0, 24, 23], [1, 1, 0, 0], [20, 10, 3, 14]])


def mix(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def by_formula(key, row, column, channel, side=SIDE):
    number = 3 * (int(row) * side + int(column)) + channel
    high = key // 2**32
    a = mix((key + 0x9E3779B9 * high) % 2**32)
    b = mix(a ^ high ^ 0x85EBCA6B)
    mixed = mix((mix(number ^ a) + b) % 2**32)
    return statistics.NormalDist().inv_cdf((mixed // 2**16 + 0.5) / 2**16)


def erased(boxes=BOXES, keys=KEYS):
    images = torch.full((len(boxes), SIDE, SIDE, 3), 9.0)
    erasing.erase(images, boxes, keys)
    return images.numpy()


def test_every_value_is_the_formulas_and_the_rest_is_left():
    images = erased()
    for image, key, (top, left, height, width) in zip(images, KEYS, BOXES, strict=True):
        inside = np.zeros((SIDE, SIDE), bool)
        inside[top : top + height, left : left + width] = True
        assert (image[~inside] == 9.0).all()
        for row, column in zip(*np.nonzero(inside), strict=True):
            expected = [by_formula(int(key), row, column, channel) for channel in range(3)]
            assert image[row, column] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_tensor_operations_draw_the_same():
    """As on a GPU where the kernels are not used: all pixels of all boxes at once."""
    which, rows, columns = erasing._pixels_of(BOXES, torch.device("cpu"))
    words = torch.from_numpy(erasing.words_of(KEYS))[:, which]
    images = torch.full((len(BOXES), SIDE, SIDE, 3), 9.0)
    erasing.fill(images, BOXES, erasing.noise(rows * SIDE + columns, *words))
    np.testing.assert_array_equal(images.numpy(), erased())


def test_a_picture_gets_the_same_wherever_it_stands():
    together = erased()
    for place in range(len(KEYS)):
        alone = erased(BOXES[place : place + 1], KEYS[place : place + 1])
        np.testing.assert_array_equal(alone[0], together[place])
    assert (erased(BOXES[2:3], KEYS[2:3]) == 9.0).all()  # nothing to erase at all


def test_noise_is_normal_and_of_each_picture_and_channel_by_itself():
    count = 40_000
    places = torch.arange(count)
    words = torch.from_numpy(erasing.words_of(np.array([11, 12], np.uint64)))
    one, other = (
        erasing.noise(places, *words[:, place, None].expand(2, count)).numpy() for place in (0, 1)
    )
    assert stats.kstest(one.ravel(), "norm").pvalue > 1e-4
    columns = np.concatenate([one, other, np.roll(one, 1, 0)], axis=1)
    related = np.abs(np.corrcoef(columns.T) - np.eye(9))
    assert related.max() < 5 / np.sqrt(count)


def decoded():
    ids = np.arange(len(KEYS))
    pixels = torch.full((len(KEYS), SIDE, SIDE, 3), 128, dtype=torch.uint8)
    return DecodedBatch(BatchPlan(0, 0, ids, ids), ids, ids, pixels)


class Params:
    erase, noise_keys = BOXES, KEYS


@pytest.mark.parametrize("draws", [1, 2])
def test_both_versions_of_the_draws_reach_the_images(draws):
    augment = AugmentConfig()
    batch = decoded()
    batch.draw_erasing(Params, draws=draws)
    normalize = Normalizer(mean=augment.mean, std=augment.std, device=torch.device("cpu"))
    images = normalize(batch).images.permute(0, 2, 3, 1).numpy()
    top, left, height, width = BOXES[0]
    patch = images[0, top : top + height, left : left + width]
    if draws == 1:
        expected = erase_noise(int(KEYS[0]), height, width)
    else:
        expected = erased()[0, top : top + height, left : left + width]
    np.testing.assert_array_equal(patch, expected)


@pytest.mark.gpu
def test_the_same_bits_on_a_gpu():
    images = torch.full((len(BOXES), SIDE, SIDE, 3), 9.0, device="cuda")
    erasing.erase(images, BOXES, KEYS)
    np.testing.assert_array_equal(images.cpu().numpy(), erased())
