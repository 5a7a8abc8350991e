"""LayerNorm beside a residual in Triton's interpreter, against float64; run by test_kernels.py in a
process of its own, because TRITON_INTERPRET=1 must be set before Triton is imported."""

import pytest
import torch
import triton.runtime.interpreter as interpreter
from torch import nn

from l2vit.models import ops
from l2vit.models.layers import normalized_beside
from l2vit.models.ops import gpu
from l2vit.models.ops import triton_layer_norm as kernels

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OURS = "_ResidualLayerNormBackward"
_patch = interpreter._patch_lang_tensor


@pytest.fixture(autouse=True, scope="session")
def loops_with_numpy_2_4():
    """Triton 3.6 turns loop bounds into integers in a way that NumPy 2.4 no longer allows."""

    def patched(tensor, scope, *more):
        _patch(tensor, scope, *more)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(gpu, "_DEVICES", ("cpu",))
    monkeypatch.setattr(gpu, "_capable", lambda index: True)
    monkeypatch.setattr(gpu, "_verdicts", {("layer_norm", 0): True})


def written_out(x, weight, bias):
    """The residual and the norm, in float64."""
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * 1, centred / spread * weight + bias


def statistics(x):
    wide = x.double()
    variance = wide.var(-1, correction=0, keepdim=True)
    return wide.mean(-1, keepdim=True).float(), (variance + 1e-5).rsqrt().float()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 5, 96),  # lanes beyond the channels, rows beyond the last block's
        (1, 1, 1, 32),
        (3, 1023),
        (40, 7, 64),  # several blocks a program, see the next fixture
    ],
)
def test_gradients(shape, dtype, residual, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    weight, bias = (torch.randn(shape[-1:]).to(dtype) for _ in range(2))
    along, beside = (torch.randn(shape).to(dtype) for _ in range(2))
    given = (beside, along if residual else None, x, *statistics(x), weight)
    got = torch.ops.l2vit.layer_norm_backward(*given)
    again = torch.ops.l2vit.layer_norm_backward(*given)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    outputs = written_out(*exact)
    upstream = (along.double() if residual else torch.zeros(shape).double(), beside.double())
    expected = torch.autograd.grad(outputs, exact, upstream)
    for found, wanted in zip((got[0], *got[1].chunk(2)), expected, strict=True):
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() <= LIMITS[dtype] * wanted.norm()


def test_values_and_gradients_of_the_layer(on_cpu):
    """As PyTorch's own module and a sum, also where one of the two goes nowhere."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(48)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 5, 48, requires_grad=True)
    for take in (lambda x, y: x.square() + y.sin(), lambda x, y: y.sin(), lambda x, y: x.square()):
        outputs = normalized_beside(x, norm)
        assert type(outputs[1].grad_fn).__name__ == OURS
        plain = (x, norm(x))
        torch.testing.assert_close(outputs, plain, rtol=0, atol=0)
        wrt = [x, norm.weight, norm.bias]
        found, expected = (
            torch.autograd.grad(take(*pair).sum(), wrt, allow_unused=True)
            for pair in (outputs, plain)
        )
        torch.testing.assert_close(found, expected)


def test_left_to_pytorch(on_cpu):
    """A module that is watched or replaced, another precision, autocast, the compiler."""
    x, norm = torch.randn(2, 48), nn.LayerNorm(48)

    def ours(x, norm):
        return type(normalized_beside(x, norm)[1].grad_fn).__name__ == OURS

    assert ours(x, norm)
    assert not ours(x, nn.LayerNorm(48, bias=False)) and not ours(x, nn.RMSNorm(48))
    assert not ours(x.bfloat16(), norm)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ours(x, norm)
    with ops.use_triton(False):
        assert not ours(x, norm)
    norm.register_forward_hook(lambda *given: None)
    assert not ours(x, norm)
    compiled = torch.compile(normalized_beside, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, nn.LayerNorm(48))[1], torch.layer_norm(x, (48,)))


def test_agrees_with_pytorch(monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    monkeypatch.setattr(kernels, "_CHECKED", ((3, 5, 96), (50, 384)))
    for dtype in LIMITS:
        gpu.require_close(*kernels.check(torch.device("cpu"), dtype), dtype)
