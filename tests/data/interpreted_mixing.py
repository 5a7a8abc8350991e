"""Mixing from bytes in Triton's interpreter, against the tensor operations that test_mixup.py holds
to timm's; run by test_augment_triton.py in a process of its own, because TRITON_INTERPRET=1 must be
set before Triton is imported."""

import numpy as np
import pytest
import torch

from l2vit.data.batch import BatchPlan, DecodedBatch, Normalizer
from l2vit.data.config import AugmentConfig
from l2vit.data.mixup import Mixer

COUNT, SIDE, CLASSES = 12, 23, 1100


def decoded(erase):
    rng = np.random.default_rng(0)
    ids = np.arange(COUNT)
    pixels = torch.from_numpy(rng.integers(0, 256, (COUNT, SIDE, SIDE, 3)).astype(np.uint8))
    batch = DecodedBatch(BatchPlan(0, 2, ids, ids), ids, rng.integers(0, CLASSES, COUNT), pixels)
    if erase:
        batch.erase_boxes = rng.integers(0, 11, (COUNT, 4))
        batch.erase_boxes[3, 2] = 0
        batch.erase_boxes[4] = [0, 0, SIDE, SIDE]
        batch.erase_keys = rng.integers(0, 2**63 - 1, COUNT).astype(np.uint64)
    return batch


def both(augment, *, mix=True, dtype=torch.float32, erase=True):
    """Images and targets by the kernels and by tensor operations."""
    mixer = Mixer(augment, num_classes=CLASSES, seed=1, dtype=dtype)
    made = []
    for bytes_only in (True, False):
        normalize = Normalizer(
            mean=augment.mean, std=augment.std, device=torch.device("cpu"), bytes_only=bytes_only
        )
        made.append(mixer(normalize(decoded(erase)), mix=mix))
    return made


def check(kernels, plain):
    assert kernels[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(kernels[0], plain[0]) and torch.equal(kernels[1], plain[1])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("group", [2, 4])
def test_the_same_bits_in_fp32(mixup, cutmix, group):
    check(*both(AugmentConfig(mixup=mixup, cutmix=cutmix, mix_group=group)))


def test_without_mixing_and_without_erasing():
    check(*both(AugmentConfig(), mix=False))
    check(*both(AugmentConfig(label_smoothing=0.0), erase=False))


def test_other_types_are_the_fp32_values_rounded():
    for dtype, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        kernels, plain = both(AugmentConfig(), dtype=dtype)
        assert kernels[0].dtype == dtype and torch.equal(kernels[1], plain[1])
        # a step of the type, for the interpreter rounds in its own way
        torch.testing.assert_close(kernels[0].float(), plain[0], rtol=2 * step, atol=1e-6)
