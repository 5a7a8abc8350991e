"""RandAugment's Triton kernels in Triton's interpreter, against timm's functions on PIL pictures,
byte for byte; run by test_augment_triton.py in a process of its own, because TRITON_INTERPRET=1
must be set before Triton is imported."""

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter
from test_augment_gpu import FILL, arguments_of

from l2vit.data import augment_triton, pil
from l2vit.data.augment import OPS

SIZE = 24
_patch = interpreter._patch_lang_tensor


@pytest.fixture(autouse=True, scope="session")
def loops_with_numpy_2_4():
    """Triton 3.6 turns loop bounds into integers in a way that NumPy 2.4 no longer allows."""

    def patched(tensor, scope, *more):
        _patch(tensor, scope, *more)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@pytest.fixture(scope="module")
def batch():
    """What breaks histograms and rounding: one colour, noise, an empty channel, two values."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (6, SIZE, SIZE, 3)).astype(np.uint8)
    x[0] = 7
    x[2, ..., 1] = 0
    x[3] = np.where(rng.random((SIZE, SIZE, 3)) < 0.02, 200, 100)
    x[4] = (np.arange(SIZE)[:, None, None] * 3 + np.arange(SIZE)[:, None] * 7 + [0, 40, 90]) % 256
    x[5] = 60 + x[1] // 4
    return x


def both(batch, ops, arguments, interpolation):
    """Bytes by the kernels and by PIL."""
    return [
        carry_out(
            torch.from_numpy(batch.copy()), ops, arguments, fill=FILL, interpolation=interpolation
        ).numpy()
        for carry_out in (augment_triton.apply_ops, pil.apply_ops)
    ]


@pytest.mark.parametrize("name", OPS)
def test_every_operation_gives_timms_bytes(batch, name):
    values = arguments_of(name, len(batch))
    ops = np.full((len(batch), 1), OPS.index(name), np.int16)
    for interpolation in ("bicubic", "bilinear"):
        np.testing.assert_array_equal(*both(batch, ops, values[:, None], interpolation))


def test_layers_in_order_and_pictures_apart(batch):
    rng = np.random.default_rng(3)
    for layers in (1, 2, 3):
        ops = rng.integers(-1, len(OPS), (len(batch), layers)).astype(np.int16)
        arguments = np.zeros(ops.shape)
        for number, name in enumerate(OPS):
            chosen = ops == number
            arguments[chosen] = np.resize(arguments_of(name, 6), chosen.sum())
        np.testing.assert_array_equal(*both(batch, ops, arguments, "bicubic"))
