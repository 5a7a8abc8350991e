"""The Triton kernels in Triton's interpreter, against float64 formulas; run by test_kernels.py
in a process of its own, because TRITON_INTERPRET=1 must be set before Triton is imported."""

import pytest
import torch
import torch.nn.functional as F
import triton.runtime.interpreter as interpreter

from l2vit.models import ops
from l2vit.models.l2vit import ConditionalPosition
from l2vit.models.layers import DepthwiseConv
from l2vit.models.ops import gpu, reference, triton_sums
from l2vit.models.ops import triton_depthwise as depthwise_kernels
from l2vit.models.ops import triton_linear_attention as attention_kernels

# bf16 has 8 bits; the interpreter cuts where a GPU rounds, so outputs are off by up to 2^-7.
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
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
    monkeypatch.setattr(gpu, "_verdicts", {})


def eq_4(qkv, scale, heads, clamp):
    """Written for one row of attention weights after the other, all in float64."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)
    weights = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu())
    total = torch.where(weights.sum(3) >= clamp, weights.sum(3), clamp)
    factor = 1.0 if scale is None else scale
    return torch.einsum("bhij,bjhd->bihd", factor * weights / total[..., None], v).flatten(2)


def plain(qkv, scale, heads, clamp):
    """The reference in PyTorch, from the fused projection."""
    out = reference.linear_attention(*ops.split_qkv(qkv, heads), scale, clamp)
    return ops.join_heads(out)


def depthwise(x, weight, bias):
    return torch.ops.l2vit.depthwise(x, weight, bias)[0]


def correlate(x, weight, bias):
    """Shifted pictures times their taps."""
    reach, (h, w) = weight.shape[3] // 2, x.shape[1:3]
    padded = F.pad(x, (0, 0, reach, reach, reach, reach))
    out = torch.zeros_like(x) if bias is None else bias.expand(x.shape)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            out = out + padded[:, i : i + h, j : j + w] * weight[:, 0, i, j]
    return out


def compare(call, formula, inputs, dtype):
    """Output and all gradients against the formula in float64; twice, to the same bits."""
    wrt = [t for t in inputs if t is not None]
    out = call(*inputs)
    upstream = torch.randn(out.shape).to(dtype)
    got = (out, *torch.autograd.grad(out, wrt, upstream))
    out = call(*inputs)
    again = (out, *torch.autograd.grad(out, wrt, upstream))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert [t.dtype for t in got] == [dtype, *(t.dtype for t in wrt)]
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    out = formula(*doubles)
    wrt = [t for t in doubles if t is not None]
    expected = (out, *torch.autograd.grad(out, wrt, upstream.double()))
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error <= LIMITS[dtype], f"result {place}: {error:.1e}"


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "clamp", "with_scale"),
    [
        (2, 49, 3, 100.0, True),  # the clamp acts on some
        (1, 45, 1, 1e-3, False),  # on none
        (1, 32, 2, 1e6, True),  # on all
        (1, 1, 1, 1.0, True),
    ],
)
def test_linear_attention(dtype, batch, tokens, heads, clamp, with_scale):
    torch.manual_seed(0)
    d = 32 if heads != 2 else 16
    qkv = torch.randn(batch, tokens, 3 * heads * d).to(dtype).requires_grad_()
    scale = (torch.rand(heads, 1, 1) + 0.5).requires_grad_() if with_scale else None
    compare(
        lambda *inputs: torch.ops.l2vit.linear_attention(*inputs, heads, clamp)[0],
        lambda *inputs: eq_4(*inputs, heads, clamp),
        (qkv, scale),
        dtype,
    )


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_sums_over_several_parts(dtype, monkeypatch):
    """More blocks than programs: some programs take two, the last one less."""
    monkeypatch.setattr(attention_kernels, "_PROGRAMS", 6)
    test_linear_attention(dtype, 1, 150, 3, 900.0, True)


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    ("shape", "size", "with_bias"),
    [
        ((1, 3, 7, 24), 7, True),
        ((2, 2, 5, 6), 3, False),
        ((1, 2, 18, 70), 3, True),
        ((1, 4, 9, 64), 5, True),  # whole blocks of channels
        ((1, 9, 3, 32), 7, True),  # several programs down
    ],
)
def test_depthwise(dtype, shape, size, with_bias, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(depthwise_kernels, "_PROGRAMS", dict.fromkeys((3, 5, 7), 4))
    monkeypatch.setattr(depthwise_kernels, "_ROWS", 4)
    monkeypatch.setattr(triton_sums, "_PARTS", 2)
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(shape[3], 1, size, size).to(dtype).requires_grad_()
    bias = torch.randn(shape[3]).to(dtype).requires_grad_() if with_bias else None
    compare(depthwise, correlate, (x, weight, bias), dtype)


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_depthwise_with_a_residual(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 40).to(dtype).requires_grad_()
    weight, bias = (torch.randn(s).to(dtype).requires_grad_() for s in ((40, 1, 3, 3), (40,)))
    compare(
        lambda *inputs: torch.ops.l2vit.depthwise(*inputs, True)[0],
        lambda x, *taps: x + correlate(x, *taps),
        (x, weight, bias),
        dtype,
    )


def test_the_check_on_a_device(monkeypatch):
    """It lets the kernels through; else none would run anywhere."""
    monkeypatch.setattr(depthwise_kernels, "SIZES", (3,))
    gpu.require_close(*depthwise_kernels.check(torch.device("cpu"), torch.float32), torch.float32)


def test_a_position_encoding_in_one_pass_unless_its_convolution_is_watched(on_cpu, monkeypatch):
    monkeypatch.setattr(gpu, "_verdicts", {("depthwise", 0): True})
    torch.manual_seed(0)
    position, x = ConditionalPosition(8), torch.randn(1, 3, 3, 8)
    seen, calls = [], []
    monkeypatch.setattr(ops, "residual_depthwise_conv", counted(calls, ops.residual_depthwise_conv))
    fused = position(x)
    assert len(calls) == 1
    with position.conv.register_forward_hook(lambda *given: seen.append(given[2])):
        by_steps = position(x)
    assert len(calls) == 1
    torch.testing.assert_close(fused, by_steps)
    torch.testing.assert_close(x + seen[0].permute(0, 2, 3, 1), by_steps)
    with torch.autocast("cpu", torch.bfloat16):  # x stays as fine as it is
        assert position(x).dtype == torch.float32


def counted(calls, function):
    def call(*inputs):
        calls.append(inputs)
        return function(*inputs)

    return call


@pytest.mark.parametrize("place", [5, 40, 70])  # in q, k and v of head 1
def test_nan_goes_where_the_formula_takes_it(place):
    torch.manual_seed(0)
    qkv = torch.randn(1, 40, 3 * 32)
    qkv[0, 33, place] = float("nan")
    qkv.requires_grad_()
    upstream = torch.randn(1, 40, 32)
    found = []
    for call in (torch.ops.l2vit.linear_attention, plain):
        out = call(qkv, None, 2, 3.0)
        out = out if torch.is_tensor(out) else out[0]
        found.append((out.isnan(), torch.autograd.grad(out, qkv, upstream)[0].isnan()))
    for got, expected in zip(*found, strict=True):
        assert expected.any() and not expected.all()
        assert torch.equal(got, expected)


def test_strides_do_not_matter():
    """Slices and transposes of inputs, parameters and the incoming gradient."""
    torch.manual_seed(0)
    qkv, scale = torch.randn(40, 2, 7 * 48)[..., 48:192].transpose(0, 1), torch.rand(3, 1, 2)
    upstream = torch.randn(2, 48, 40).transpose(1, 2)
    x, weight = (
        torch.randn(2, 6, 3, 4).permute(0, 2, 3, 1),
        torch.randn(3, 3, 1, 12).permute(3, 2, 0, 1),
    )
    cases = [
        (
            lambda *a: torch.ops.l2vit.linear_attention(*a, 3, 9.0)[0],
            [qkv, scale[..., :1]],
            upstream,
        ),
        (depthwise, [x, weight[::2], torch.randn(6, 2)[:, 0]], x.flip(1)),
    ]
    for call, inputs, grad in cases:
        found = []
        for copied in (False, True):
            given = [t.contiguous() if copied else t for t in inputs]
            given = [t.detach().requires_grad_() for t in given]
            out = call(*given)
            found.append((out, *torch.autograd.grad(out, given, grad)))
        for got, expected in zip(*found, strict=True):
            assert torch.equal(got, expected)


def test_gradients_have_the_strides_that_compilers_are_told():
    """One channel: the padded sums could pass for the kernel's gradient without a copy."""
    x, weight = torch.randn(1, 2, 3, 1), torch.randn(1, 1, 7, 7)
    _, taps = torch.ops.l2vit.depthwise(x, weight, None)
    for grad in torch.ops.l2vit.depthwise_backward(x, taps, x, torch.float16):
        assert grad.stride() == torch.empty(grad.shape).stride()


def test_operators_keep_pytorchs_rules():
    """Schema, fake tensors, autograd registration, tracing with symbolic shapes."""
    qkv = torch.randn(1, 20, 96, requires_grad=True)
    scale = torch.rand(1, 1, 1, requires_grad=True)
    torch.library.opcheck(torch.ops.l2vit.linear_attention.default, (qkv, scale, 1, 5.0))
    x, weight = (torch.randn(s, requires_grad=True) for s in ((1, 2, 3, 4), (4, 1, 3, 3)))
    torch.library.opcheck(torch.ops.l2vit.depthwise.default, (x, weight, None))


def test_no_second_derivative():
    qkv = torch.randn(1, 20, 96, requires_grad=True)
    out = torch.ops.l2vit.linear_attention(qkv, None, 1, 5.0)[0]
    (grad,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_chosen_checked_and_compiled(on_cpu):
    """The whole way: a compiled function checks the kernel while it is traced, then calls it."""
    torch.manual_seed(0)

    def run(qkv):
        return ops.linear_attention(qkv, None, 2, 30.0) * 2

    qkv = torch.randn(1, 40, 6 * 32, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(qkv).sum(), qkv)
    assert gpu._verdicts == {("linear_attention", 0): True}
    module = torch.nn.Module()
    module.forward = run
    assert "l2vit" not in str(torch.export.export(module, (qkv.detach(),)).graph)
    with ops.use_triton(False):
        assert not gpu.may_run("linear_attention", qkv)
        (expected,) = torch.autograd.grad(run(qkv).sum(), qkv)
    torch.testing.assert_close(grad, expected)
    strange = torch.randn(1, 40, 3 * 24)  # a head width that no kernel is written for
    assert torch.equal(
        ops.linear_attention(strange, None, 1, 5.0),
        plain(strange, None, 1, 5.0),
    )


def test_autocast(on_cpu, monkeypatch):
    monkeypatch.setattr(gpu, "_verdicts", {("depthwise", 0): True})
    conv, x = DepthwiseConv(4, 3), torch.randn(1, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == conv.weight.grad.dtype == conv.bias.grad.dtype == torch.float32
