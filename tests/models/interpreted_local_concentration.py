"""Local concentration in Triton's interpreter, against float64; run by test_kernels.py in a process
of its own, because TRITON_INTERPRET=1 must be set before Triton is imported."""

import pytest
import torch
import torch.nn.functional as F
import triton.runtime.interpreter as interpreter
from torch import nn

from l2vit.models import ops
from l2vit.models.l2vit import LocalConcentration
from l2vit.models.ops import gpu, triton_depthwise
from l2vit.models.ops import triton_local_concentration as kernels
from l2vit.models.ops.recompute import recompute

LIMITS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
OURS = "_LocalConcentrationBackward"
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
    proven = {(kernel, 0): True for kernel in ("local_concentration", "depthwise")}
    monkeypatch.setattr(gpu, "_verdicts", proven)


@pytest.fixture
def several_parts(monkeypatch):
    monkeypatch.setattr(triton_depthwise, "_PROGRAMS", dict.fromkeys((3, 5, 7), 2))
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    monkeypatch.setattr(kernels, "_BLOCK_M", 8)
    monkeypatch.setattr(kernels, "_PARTS", 2)


def written_out(x, weight1, bias1, norm_weight, norm_bias, weight2, bias2):
    """Output, mean and unbiased variance, in the inputs' precision."""

    def convolved(x, weight, bias):
        x = x.permute(0, 3, 1, 2)
        x = F.conv2d(x, weight, bias, padding=weight.shape[3] // 2, groups=x.shape[1])
        return x.permute(0, 2, 3, 1)

    y = convolved(x, weight1, bias1)
    y = y * (1 + torch.erf(y / 2**0.5)) / 2
    mean = y.mean((0, 1, 2))
    variance = (y - mean).square().mean((0, 1, 2))
    n = (y - mean) / (variance + 1e-5).sqrt() * norm_weight + norm_bias
    count = y.numel() / y.shape[3]
    return convolved(n, weight2, bias2), mean, variance * count / (count - 1)


@pytest.mark.parametrize(
    ("shape", "size", "dtype"),
    [
        ((2, 3, 9, 40), 3, torch.float32),
        ((1, 3, 8, 70), 3, torch.float16),
        ((1, 4, 8, 64), 3, torch.bfloat16),
        ((1, 4, 7, 32), 7, torch.float32),
    ],
)
def test_against_float64(shape, size, dtype, several_parts):
    torch.manual_seed(0)
    c = shape[3]
    shapes = [shape, *[(c, 1, size, size), (c,)], (c,), (c,), *[(c, 1, size, size), (c,)]]
    given = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    upstream = torch.randn(shape).to(dtype)
    running = [torch.zeros(c), torch.ones(c)]
    out = kernels.local_concentration(*given[:5], *running, 0.1, 1e-5, *given[5:])
    got = [out, *torch.autograd.grad(out, given, upstream)]
    again = kernels.local_concentration(*given[:5], None, None, 0.1, 1e-5, *given[5:])
    repeated = [again, *torch.autograd.grad(again, given, upstream)]
    assert all(torch.equal(a, b) for a, b in zip(got, repeated, strict=True))
    exact = [t.detach().double().requires_grad_() for t in given]
    wanted, mean, variance = written_out(*exact)
    expected = [wanted, *torch.autograd.grad(wanted, exact, upstream.double())]
    limit = LIMITS[dtype]
    torch.testing.assert_close(running[0].double(), 0.1 * mean, rtol=limit, atol=limit)
    torch.testing.assert_close(running[1].double(), 0.9 + 0.1 * variance, rtol=limit, atol=limit)
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == dtype and a.shape == b.shape
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error <= limit, f"result {place}: {error:.1e}"


def test_statistics_of_a_large_mean(several_parts):
    """1,000 times the deviation: sums of squares in fp32 would lose the variance."""
    torch.manual_seed(0)
    x = 1000 + torch.randn(3, 7, 9, 40)
    out, norm = torch.ops.l2vit.gelu_statistics(
        x, torch.ones(40), torch.zeros(40), None, None, 0.1, 1e-5
    )
    wide = x.double().flatten(0, 2)
    assert torch.equal(out, x)  # so far out GELU is the identity
    torch.testing.assert_close(norm[0].double(), wide.mean(0), rtol=1e-6, atol=0)
    deviation = (wide.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(norm[1].double(), 1 / deviation, rtol=1e-4, atol=0)


def is_fused(out):
    return any(type(f[0]).__name__ == OURS for f in out.grad_fn.next_functions) or (
        type(out.grad_fn).__name__ == OURS
    )


@pytest.mark.parametrize("momentum", [0.1, None])
def test_as_the_modules(momentum, on_cpu):
    """Two passes of training, then evaluation: output, gradients, running statistics."""
    torch.manual_seed(0)
    fused, plain = LocalConcentration(8, 3), LocalConcentration(8, 3)
    plain.load_state_dict(fused.state_dict())
    for module in (fused, plain):
        module.norm.momentum = momentum
    for _ in range(2):
        x = torch.randn(2, 4, 5, 8, requires_grad=True)
        found = []
        for module, on in ((fused, True), (plain, False)):
            with ops.use_triton(on):
                out = module(x)
            assert is_fused(out) is on
            wrt = [x, *module.parameters()]
            found.append([out, *torch.autograd.grad(out.square().sum(), wrt)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused.state_dict(), plain.state_dict())
    assert not is_fused(fused.eval()(x))


def test_left_to_the_modules(on_cpu):
    """Watched or replaced modules, autocast, another precision; a second forward does not count."""
    module, x = LocalConcentration(8, 3), torch.randn(2, 4, 5, 8, requires_grad=True)
    recompute(module, x).sum().backward()
    assert module.norm.num_batches_tracked == 1
    once = module.norm.running_mean.clone()
    again = LocalConcentration(8, 3)
    again.load_state_dict(module.state_dict())
    again.norm.reset_running_stats()
    again(x)
    torch.testing.assert_close(again.norm.running_mean, once)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(module(x))
    with module.norm.register_forward_hook(lambda *given: None):
        assert not is_fused(module(x))
    assert is_fused(module(x))
    module.norm = nn.Identity()
    assert not is_fused(module(x))


def test_the_check_on_a_device(monkeypatch):
    monkeypatch.setattr(kernels, "SIZES", (3,))
    gpu.require_close(*kernels.check(torch.device("cpu"), torch.float32), torch.float32)
