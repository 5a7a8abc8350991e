"""Mixing against timm's Mixup on the same draws, and its draws against timm's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import mixup as timm_mixup

from l2vit.data.batch import Batch
from l2vit.data.config import AugmentConfig
from l2vit.data.mixup import Mixer
from l2vit.data.rng import derive_key, uniforms
from l2vit.errors import ConfigError

CLASSES = 7


def make_batch(size=12, first=0, epoch=0, side=16):
    rng = np.random.default_rng(first)
    images = torch.from_numpy(rng.normal(size=(size, 3, side, side)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, CLASSES, size))
    return Batch(images, labels, np.arange(size), first + np.arange(size), epoch)


@pytest.mark.parametrize("group", [2, 4, 12])
@pytest.mark.parametrize("mixup, cutmix", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_each_group_is_mixed_as_timm_mixes_a_batch(monkeypatch, group, mixup, cutmix):
    mixer = Mixer(
        AugmentConfig(mixup=mixup, cutmix=cutmix, mix_group=group), num_classes=CLASSES, seed=0
    )
    for epoch in range(3):
        batch = make_batch(epoch=epoch)
        params = mixer.sample(epoch, batch.positions, 16, 16)
        images, targets = mixer(batch)
        assert targets.dtype == torch.float32
        for first in range(0, 12, group):
            timms = timm_mixup.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)
            weight, cut = float(params.weights[first]), bool(params.cut[first])
            monkeypatch.setattr(timms, "_params_per_batch", lambda w=weight, c=cut: (w, c))
            box = (params.boxes[first][[0, 1, 2, 3]].tolist(), weight)
            monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", lambda *a, b=box, **k: b)
            part = slice(first, first + group)
            expected = timms(batch.images[part].clone(), batch.labels[part])
            torch.testing.assert_close(images[part], expected[0])
            torch.testing.assert_close(targets[part], expected[1])


@pytest.mark.parametrize("switch", [0.5, 0.2])
def test_draws_like_timm(switch):
    count, side = 6000, 64
    mixer = Mixer(AugmentConfig(mix_switch_prob=switch), num_classes=CLASSES, seed=3)
    params = mixer.sample(0, np.arange(2 * count), side, side)
    np.random.seed(0)
    timms = timm_mixup.Mixup(0.8, 1.0, switch_prob=switch)
    theirs = [timms._params_per_batch() for _ in range(count)]
    cut = params.cut[::2]
    assert stats.binomtest(int(cut.sum()), count, switch).pvalue > 1e-4
    plain = [weight for weight, cutmix in theirs if not cutmix]
    assert stats.ks_2samp(params.weights[::2][~cut], plain).pvalue > 1e-4
    boxes = [
        timm_mixup.cutmix_bbox_and_lam((3, side, side), weight)
        for weight, cutmix in theirs
        if cutmix
    ]
    for column in range(4):
        ours = params.boxes[::2][cut][:, column]
        assert stats.ks_2samp(ours, [box[column] for box, _ in boxes]).pvalue > 1e-4
    corrected = [weight for _, weight in boxes]
    assert stats.ks_2samp(params.weights[::2][cut], corrected).pvalue > 1e-4


def test_boxes_are_timms_of_the_same_weight_and_centre(monkeypatch):
    """Sizes odd and even, cut off at every side."""
    groups, height, width = np.arange(400), 47, 64
    weights = np.random.default_rng(0).uniform(size=len(groups))
    mixer = Mixer(AugmentConfig(), num_classes=CLASSES, seed=5)
    boxes, left = mixer._boxes(2, groups, weights, height, width)
    centres = uniforms(derive_key("mix box", 5, 2), groups, 2) * (height, width)
    for i, weight in enumerate(weights.tolist()):
        centre = iter(centres[i].astype(int).tolist())
        monkeypatch.setattr(np.random, "randint", lambda *_, at=centre, **__: next(at))
        expected = timm_mixup.cutmix_bbox_and_lam((3, height, width), weight)
        assert (tuple(boxes[i].tolist()), left[i]) == (expected[0], pytest.approx(expected[1]))


def test_draws_are_a_function_of_seed_epoch_and_group():
    places = np.arange(200)

    def weights(seed, epoch, places=places):
        mixer = Mixer(AugmentConfig(), num_classes=CLASSES, seed=seed)
        return mixer.sample(epoch, places, 64, 64).weights

    one = weights(1, 0)
    np.testing.assert_array_equal(weights(1, 0, places[50:60]), one[50:60])
    for other in (weights(2, 0), weights(1, 1)):
        assert (other != one).mean() > 0.9


def test_the_same_at_any_world_size():
    mixer = Mixer(AugmentConfig(mix_group=4), num_classes=CLASSES, seed=0)
    whole = make_batch(24)
    images, targets = mixer(whole)
    for first in range(0, 24, 8):
        part = slice(first, first + 8)
        batch = Batch(
            whole.images[part], whole.labels[part], whole.sample_ids[part], whole.positions[part], 0
        )
        found = mixer(batch)
        torch.testing.assert_close(found[0], images[part], rtol=0, atol=0)
        torch.testing.assert_close(found[1], targets[part], rtol=0, atol=0)


def test_off_means_smoothed_labels_alone():
    mixer = Mixer(AugmentConfig(label_smoothing=0.1), num_classes=CLASSES, seed=0)
    batch = make_batch()
    images, targets = mixer(batch, mix=False)
    assert images is batch.images
    reference = torch.nn.functional.cross_entropy(
        torch.eye(CLASSES)[batch.labels] * 3, batch.labels, label_smoothing=0.1
    )
    logs = torch.log_softmax(torch.eye(CLASSES)[batch.labels] * 3, 1)
    torch.testing.assert_close(-(targets * logs).sum(1).mean(), reference)


def test_a_group_must_not_span_micro_batches():
    mixer = Mixer(AugmentConfig(mix_group=4), num_classes=CLASSES, seed=0)
    with pytest.raises(ConfigError, match="mix_group: 4 must divide the micro-batch of 6"):
        mixer(make_batch(6))
