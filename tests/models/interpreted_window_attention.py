"""Window attention in Triton's interpreter, against float64; run by test_kernels.py in a process
of its own, because TRITON_INTERPRET=1 must be set before Triton is imported."""

import pytest
import torch
import triton.runtime.interpreter as interpreter

from l2vit.models import ops
from l2vit.models.ops import gpu
from l2vit.models.ops import triton_window_attention as kernels

LIMITS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
_patch = interpreter._patch_lang_tensor


@pytest.fixture(autouse=True, scope="session")
def loops_with_numpy_2_4():
    """Triton 3.6 turns loop bounds into integers in a way that NumPy 2.4 no longer allows."""

    def patched(tensor, scope, *more):
        _patch(tensor, scope, *more)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def by_loops(qkv, heads, window):
    """Window by window and head by head, in float64."""
    b, h, w, width = qkv.shape
    d = width // (3 * heads)
    out = torch.zeros(b, h, w, width // 3, dtype=qkv.dtype)
    for y in range(0, h, window):
        for x in range(0, w, window):
            tokens = qkv[:, y : y + window, x : x + window].reshape(b, -1, 3, heads, d)
            for head in range(heads):
                q, k, v = (tokens[:, :, part, head] for part in range(3))
                weights = torch.softmax(q @ k.transpose(1, 2) / d**0.5, dim=2)
                mixed = (weights @ v).view(b, window, window, d)
                columns = slice(head * d, (head + 1) * d)
                out[:, y : y + window, x : x + window, columns] = mixed
    return out


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    ("shape", "heads", "window"),
    [
        ((2, 14, 7, 96), 1, 7),
        ((1, 7, 14, 192), 2, 7),
        ((1, 12, 12, 192), 4, 12),  # three blocks, the last a quarter full; heads of 16
        ((1, 8, 8, 96), 1, 8),  # a block exactly
        ((1, 9, 9, 96), 1, 9),  # one key more than a block and a bit
        ((1, 3, 2, 96), 1, 1),
    ],
)
def test_against_float64(dtype, shape, heads, window):
    torch.manual_seed(0)
    qkv = (2 * torch.randn(shape)).to(dtype).requires_grad_()
    upstream = torch.randn(*shape[:3], shape[3] // 3).to(dtype)
    out = torch.ops.l2vit.window_attention(qkv, heads, window)[0]
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    exact = qkv.detach().double().requires_grad_()
    expected = by_loops(exact, heads, window)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream.double())
    assert out.dtype == grad.dtype == dtype
    for got, wanted in ((out, expected), (grad, expected_grad)):
        if window == 1:  # nothing but rounding is left of the gradients of q and k
            assert (got.double() - wanted).abs().max() <= LIMITS[dtype] * wanted.abs().max()
            continue
        for part, truth in zip(got.double().chunk(3, 3), wanted.chunk(3, 3), strict=True):
            assert (part - truth).norm() <= LIMITS[dtype] * truth.norm()


def test_same_bits_twice_and_for_any_strides():
    torch.manual_seed(0)
    stored = torch.randn(1, 7, 192, 14).permute(0, 1, 3, 2)
    upstream = torch.randn(1, 14, 7, 64).transpose(1, 2)
    found = []
    for given, grad in ((stored, upstream), (stored.contiguous(), upstream.contiguous())) * 2:
        qkv = given.detach().requires_grad_()
        out = torch.ops.l2vit.window_attention(qkv, 2, 7)[0]
        found.append((out, *torch.autograd.grad(out, qkv, grad)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_nan_stays_in_its_window_and_head():
    torch.manual_seed(0)
    qkv = torch.randn(1, 7, 14, 192)
    qkv[0, 3, 9, 64 + 5] = float("nan")  # a key of head 0 in the second window
    out = torch.ops.l2vit.window_attention(qkv, 2, 7)[0]
    assert out[0, :, 7:, :32].isnan().all()
    assert not out[0, :, :7].isnan().any() and not out[0, :, :, 32:].isnan().any()


def test_operator_keeps_pytorchs_rules():
    qkv = torch.randn(1, 7, 7, 96, requires_grad=True)
    torch.library.opcheck(torch.ops.l2vit.window_attention.default, (qkv, 1, 7))


def test_chosen_where_it_agrees(monkeypatch):
    monkeypatch.setattr(gpu, "_DEVICES", ("cpu",))
    monkeypatch.setattr(gpu, "_capable", lambda index: True)
    monkeypatch.setattr(gpu, "_verdicts", {})
    torch.manual_seed(0)
    qkv = torch.randn(2, 14, 14, 96)
    got = ops.window_attention(qkv, 1, 7)
    assert gpu._verdicts == {("window_attention", 0): True}
    torch.testing.assert_close(got, kernels.plain(qkv, 1, 7))
    strange = torch.randn(1, 7, 7, 3 * 24)  # a head width that no kernel is written for
    torch.testing.assert_close(ops.window_attention(strange, 1, 7), kernels.plain(strange, 1, 7))
