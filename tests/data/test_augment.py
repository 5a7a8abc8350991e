"""The drawn parameters against timm's and torchvision's own draws."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter

from l2vit.data.augment import (
    NO_OP,
    OPS,
    AugmentSampler,
    erase_noise,
    erase_values,
    fill_colour,
)
from l2vit.data.config import AugmentConfig
from l2vit.errors import ConfigError

COUNT = 4000
CERTAIN = 1e-4  # seeded, so a passing test passes always; a wrong formula gives p < 1e-20


def draw(size=64, count=COUNT, epoch=0, seed=1, **augment):
    sampler = AugmentSampler(AugmentConfig(**augment), input_size=size, seed=seed)
    return sampler, sampler.sample(epoch, np.arange(count))


def same_distribution(ours, theirs):
    return stats.ks_2samp(np.asarray(ours, float), np.asarray(theirs, float)).pvalue > CERTAIN


@pytest.mark.parametrize("scale, ratio", [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.7), (0.9, 2.0))])
@pytest.mark.parametrize("width, height", [(500, 375), (60, 400), (400, 60), (9, 9)])
def test_crop_boxes_like_timm(width, height, scale, ratio):
    sampler, drawn = draw(scale=scale, ratio=ratio)
    ours = sampler.boxes(drawn, np.tile([height, width], (COUNT, 1)))
    random.seed(0)
    image = Image.new("RGB", (width, height))
    params = RandomResizedCropAndInterpolation.get_params
    theirs = np.array([params(image, scale, ratio) for _ in range(COUNT)])
    for column in range(4):
        assert same_distribution(ours[:, column], theirs[:, column]), column
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()


def test_pictures_of_a_few_pixels_have_a_crop():
    sampler, drawn = draw()
    sizes = np.random.default_rng(0).integers(1, 4, (COUNT, 2))
    boxes = sampler.boxes(drawn, sizes)
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


@pytest.mark.parametrize(
    "text", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8", "rand-m9-mstd101-inc1", "rand-m15-mmax20"]
)
def test_rand_augment_like_timm(text):
    _, drawn = draw(count=6000, auto_augment=text)
    timms = rand_augment_transform(text, {"img_mean": (124, 116, 104)})
    seen: list[tuple[str, float]] = []

    def recorder(function_name):
        return lambda image, *args, **_: seen.append((function_name, *(args or (0.0,)))) or image

    from timm.data import auto_augment

    by_function = {auto_augment.NAME_TO_OP[name]: name for name in OPS}
    for op in timms.ops:
        op.aug_fn = recorder(by_function[op.aug_fn])
    random.seed(1)
    np.random.seed(1)
    for _ in range(6000):
        timms(None)
    ours_applied = drawn.ops != NO_OP
    for number, name in enumerate(OPS):
        ours = drawn.arguments[drawn.ops == number]
        theirs = np.array([argument for found, argument in seen if found == name])
        test = stats.binomtest(len(ours), len(ours) + len(theirs))
        assert test.pvalue > CERTAIN, f"{name}: chosen {len(ours)} times, timm {len(theirs)}"
        assert same_distribution(ours, theirs), f"{name}: {ours[:5]} {theirs[:5]}"
    assert abs(ours_applied.mean() - timms.ops[0].prob) < 0.02


def test_erasing_like_timm():
    size = 64
    _, drawn = draw(size, erase_prob=0.25)
    timms = RandomErasing(probability=0.25, mode="const", device="cpu")
    random.seed(2)
    theirs = []
    for _ in range(COUNT):
        mask = timms(torch.ones(1, size, size))[0] == 0
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(rows):
            theirs.append((rows.min(), columns.min(), len(rows), len(columns)))
    ours = drawn.erase[drawn.erase[:, 2] > 0]
    assert stats.binomtest(len(ours), COUNT, 0.25).pvalue > CERTAIN
    assert stats.binomtest(len(theirs), COUNT, 0.25).pvalue > CERTAIN
    for column in range(4):
        assert same_distribution(ours[:, column], np.array(theirs)[:, column]), column


def test_erasing_noise_is_normal_and_repeatable():
    noise = erase_noise(7, 60, 50)
    assert noise.shape == (60, 50, 3) and noise.dtype == np.float32
    assert stats.kstest(noise.ravel(), "norm").pvalue > CERTAIN
    np.testing.assert_array_equal(noise, erase_noise(7, 60, 50))
    assert not np.array_equal(noise, erase_noise(8, 60, 50))


def test_every_erased_box_has_noise_of_its_own():
    boxes = np.array([[0, 1, 3, 2], [5, 5, 0, 0], [2, 0, 3, 2]])
    found = erase_values(boxes, np.array([4, 5, 6], np.uint64))
    expected = [erase_noise(key, 3, 2).reshape(-1, 3) for key in (4, 6)]
    np.testing.assert_array_equal(found, np.concatenate(expected))


def test_flip_and_jitter_like_torchvision():
    _, drawn = draw(auto_augment="", color_jitter=0.4, hflip=0.5)
    assert stats.binomtest(int(drawn.flip.sum()), COUNT, 0.5).pvalue > CERTAIN
    torch.manual_seed(0)
    limits = [0.6, 1.4]
    names = ("Brightness", "Contrast", "Color")
    theirs = [ColorJitter.get_params(limits, limits, limits, None) for _ in range(COUNT)]
    for kind, name in enumerate(names):
        at = drawn.ops == OPS.index(name)
        assert at.sum(1).tolist() == [1] * COUNT
        assert same_distribution(drawn.arguments[at], [t[1 + kind] for t in theirs])
        first = [[i for i in t[0].tolist() if i < 3].index(kind) for t in theirs]
        assert same_distribution(at.argmax(1), first)


def test_draws_are_a_function_of_seed_epoch_and_sample():
    sampler, whole = draw(count=200)
    some = np.array([150, 3, 77])
    part = sampler.sample(0, some)
    for name in ("crop", "flip", "ops", "arguments", "erase", "noise_keys"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[some])
    for other in (draw(count=200, epoch=1)[1], draw(count=200, seed=2)[1]):
        assert not np.array_equal(other.crop, whole.crop)
        assert not np.array_equal(other.ops, whole.ops)


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", ""])
def test_what_is_drawn_for_a_sample_is_drawn_apart(text):
    """No two parameters come from one random number."""
    _, drawn = draw(auto_augment=text, color_jitter=0.4)
    erased = drawn.erase[:, 2] > 0
    values = [
        *drawn.crop[:, 0].T,
        *drawn.crop[:, 1].T,
        drawn.flip,
        *drawn.ops.T,
        *drawn.arguments.T,
        erased,
        drawn.noise_keys.astype(float),
    ]
    related = np.abs(np.corrcoef(np.stack([np.asarray(v, float) for v in values])))
    own = len(drawn.ops.T)  # an argument goes with its operation
    related[9 : 9 + 2 * own, 9 : 9 + 2 * own] = 0
    assert (related - np.diag(np.diag(related))).max() < 5 / np.sqrt(COUNT)
    boxes = [*drawn.erase[erased].T, *drawn.crop[erased, 0].T, drawn.flip[erased]]
    related = np.abs(np.corrcoef(np.stack([np.asarray(v, float) for v in boxes])))[:4, 4:]
    assert related.max() < 5 / np.sqrt(erased.sum())


def test_no_augmentation_draws_nothing():
    _, drawn = draw(auto_augment="", hflip=0.0, erase_prob=0.0)
    assert not drawn.flip.any() and drawn.ops.shape == (COUNT, 0) and not drawn.erase.any()


def test_fill_is_the_mean_colour_in_bytes():
    assert fill_colour(AugmentConfig()) == (124, 116, 104)


@pytest.mark.parametrize(
    "text, what",
    [
        ("augmix-m3", "no RandAugment"),
        ("rand-m9-t3a", "Desaturate"),
        ("rand-m9-tweights-inc1", "weighted"),
        ("rand-x9", "no RandAugment"),
    ],
)
def test_unknown_augmentation_is_refused(text, what):
    with pytest.raises(ConfigError, match=what):
        AugmentSampler(AugmentConfig(auto_augment=text), input_size=64, seed=0)
