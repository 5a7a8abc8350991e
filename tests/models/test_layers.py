"""The parts, each against a plain float64 formula or PyTorch's own."""

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from l2vit.models import ops
from l2vit.models.families.attention import AttentionSpec
from l2vit.models.families.base import ATTENTIONS
from l2vit.models.l2vit import LinearAttention, WindowAttention
from l2vit.models.layers import BatchNorm2d, DepthwiseConv, Mlp
from l2vit.models.ops import linear_attention, reference, softmax_attention
from l2vit.models.ops.windows import merge, partition


def by_formula(qkv, scale, heads, clamp):
    """The reference, from the fused projection."""
    return ops.join_heads(reference.linear_attention(*ops.split_qkv(qkv, heads), scale, clamp))


def attention_by_loops(qkv, scale, heads, clamp):
    """Eq. 4 token by token."""
    batch, tokens, width = qkv.shape
    d = width // (3 * heads)
    out = torch.zeros(batch, tokens, heads * d, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            q, k, v = (qkv[b, :, (part * heads + h) * d :][:, :d].double() for part in range(3))
            for i in range(tokens):
                weights = (q[i].clamp(min=0) * k.clamp(min=0)).sum(1)
                mixed = (weights[:, None] * v).sum(0) * scale[h].item()
                out[b, i, h * d : (h + 1) * d] = mixed / max(weights.sum().item(), clamp)
    return out


@pytest.mark.parametrize("tokens", [20, 130])
@pytest.mark.parametrize("order", ["kv", "qk", "auto"])
def test_linear_attention_is_eq_4(tokens, order):
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3 * 16, dtype=torch.float64)
    scale = torch.rand(2, 1, 1, dtype=torch.float64)
    clamp = 0.6 * tokens  # between the denominators
    expected = attention_by_loops(qkv, scale, 2, clamp)
    torch.testing.assert_close(linear_attention(qkv, scale, 2, clamp, order), expected)
    as_map = linear_attention(qkv.unflatten(1, (-1, 2)), scale, 2, clamp, order)
    torch.testing.assert_close(as_map.flatten(1, 2), expected)
    found = ops.linear_attention_denominators(qkv, 2)
    assert found.shape == (2, 2, tokens, 1) and (found < clamp).any() and (found > clamp).any()


@pytest.mark.parametrize("with_scale", [True, False])
def test_linear_attention_gradients(with_scale):
    """By finite differences, on both sides of the clamp, and beside autograd on the formula."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 130, 3 * 8, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(2, 1, 1, dtype=torch.float64, requires_grad=True) if with_scale else None
    weights = torch.randn(1, 130, 8, dtype=torch.float64)
    wrt = (qkv, scale) if with_scale else (qkv,)
    fast = torch.autograd.grad((linear_attention(qkv, scale, 2, 60.0) * weights).sum(), wrt)
    formula = torch.autograd.grad((by_formula(qkv, scale, 2, 60.0) * weights).sum(), wrt)
    torch.testing.assert_close(fast, formula)
    direction = torch.randn_like(qkv)
    with torch.no_grad():
        ends = [
            (linear_attention(qkv + sign * 1e-6 * direction, scale, 2, 60.0) * weights).sum()
            for sign in (1, -1)
        ]
    slope = (ends[0] - ends[1]) / 2e-6
    torch.testing.assert_close((fast[0] * direction).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_attention_in_low_precision(dtype):
    """kᵀ v of 3,000 tokens with values around 30 is 40 times what fp16 can hold."""
    torch.manual_seed(0)
    qkv = (30 * torch.randn(1, 3000, 3 * 32)).to(dtype).requires_grad_()
    expected = attention_by_loops(qkv.detach(), torch.ones(1, 1, 1), 1, 100.0)
    for call in (linear_attention, by_formula):
        got = call(qkv, None, 1, 100.0)
        assert got.dtype == dtype
        error = (got.double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
        (grad,) = torch.autograd.grad(got.float().sum(), qkv)
        assert grad.isfinite().all()


def test_attention_map_rows():
    """Times v it is the attention; its rows sum to s where the clamp does not act, else to less."""
    torch.manual_seed(0)
    layer = LinearAttention(64, 2, clamp=5.0).double()
    x = torch.randn(1, 40, 64, dtype=torch.float64)
    seen = []
    layer.observer = seen.append
    weights = layer.attention_map(x)
    v = layer.qkv(x)[..., 128:].view(1, 40, 2, 32).transpose(1, 2)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.proj(mixed), layer(x))
    (denominators,) = seen
    sums = 32**-0.5 * denominators / denominators.clamp(min=5.0)
    torch.testing.assert_close(weights.sum(3, keepdim=True), sums)


def test_order_follows_the_number_of_tokens():
    """Sec. 11: q kᵀ first below 32 tokens. The products made tell which it was."""
    for tokens, order, macs in (
        (31, "auto", 2 * 31 * 31 * 32),
        (32, "auto", 2 * 32 * 32 * 32),
        (40, "auto", 2 * 40 * 32 * 32),
        (4, "kv", 2 * 4 * 32 * 32),
        (40, "qk", 2 * 40 * 40 * 32),
    ):
        counter = FlopCounterMode(display=False)
        with counter:
            linear_attention(torch.randn(1, tokens, 3 * 32), None, 1, 100.0, order)
        assert counter.get_total_flops() == 2 * (macs + tokens * 32)  # and the denominators


@pytest.mark.parametrize("shape", [(5, 6), (1, 1), (2, 9), (14, 14), (3, 2)])
@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
def test_depthwise_gradients(shape, kernel):
    torch.manual_seed(0)
    x = torch.randn(2, *shape, 8, requires_grad=True)
    weight = torch.randn(8, 1, kernel, kernel, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    out = ops.depthwise_conv(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
    upstream = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, (x, weight, bias), upstream))
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    padded = F.pad(x, (0, 0, kernel // 2, kernel // 2, kernel // 2, kernel // 2))
    out = bias.expand(2, *shape, 8)
    for i in range(kernel):
        for j in range(kernel):
            out = out + padded[:, i : i + shape[0], j : j + shape[1]] * weight[:, 0, i, j]
    expected = (out, *torch.autograd.grad(out, (x, weight, bias), upstream.double()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_depthwise_can_be_differentiated_twice():
    conv = DepthwiseConv(2, 5)
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    (first,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    twin = nn.Conv2d(2, 2, 5, padding=2, groups=2)
    twin.load_state_dict(conv.state_dict())
    y = twin(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), x)[0])


def test_bf16_on_a_processor_without_avx512():
    """oneDNN obeys the variable when it is loaded, so in a process of its own."""
    code = """
import torch, l2vit, timm
model = timm.create_model("l2vit_mini").bfloat16()
images = torch.randn(2, 3, 32, 32).bfloat16()
model(images).float().sum().backward()
with torch.no_grad():
    assert model.eval()(images).isfinite().all()
"""
    variables = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["pvt2", "local"])
def test_mlps_of_figure_4(kind):
    mlp = Mlp(8, 16, kind).double().eval()
    x = torch.randn(1, 6, 5, 8, dtype=torch.float64)
    y = (x @ mlp.fc1.weight.T + mlp.fc1.bias).permute(0, 3, 1, 2)
    if kind == "local":
        y = F.gelu(mlp.norm1(y))
    y = F.conv2d(y, mlp.conv.weight, mlp.conv.bias, padding=1, groups=16)
    if kind == "local":
        y = mlp.norm2(y)
    y = F.gelu(y).permute(0, 2, 3, 1) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), y)


def test_windows_there_and_back():
    x = torch.arange(2 * 6 * 8 * 3.0).view(2, 6, 8, 3)
    windows = partition(x, 3, 4)
    assert windows.shape == (8, 12, 3)
    torch.testing.assert_close(windows[1], x[0, :3, 4:].reshape(12, 3))
    torch.testing.assert_close(windows[6], x[1, 3:, :4].reshape(12, 3))
    torch.testing.assert_close(merge(windows, 3, 4, 6, 8), x)


def test_window_attention_pads_with_zeros_that_take_part():
    attention = WindowAttention(32, 1, 4).double()
    x = torch.randn(1, 5, 3, 32, dtype=torch.float64)
    padded = torch.zeros(1, 8, 4, 32, dtype=torch.float64)
    padded[:, :5, :3] = x
    rows = []
    for row in (0, 4):
        q, k, v = attention.qkv(padded[:, row : row + 4].reshape(16, 32)).chunk(3, dim=1)
        rows.append(attention.proj((q @ k.T / math.sqrt(32)).softmax(1) @ v))
    expected = torch.cat(rows).view(1, 8, 4, 32)[:, :5, :3]
    torch.testing.assert_close(attention(x), expected)


def test_softmax_attention_takes_a_bias():
    q, k, v = torch.randn(3, 2, 4, 9, 8).to(torch.bfloat16).requires_grad_().unbind(0)
    bias = torch.randn(4, 9, 9)
    got = softmax_attention(q, k, v, bias)
    scores = q.double() @ k.double().transpose(2, 3) / math.sqrt(8) + bias.double()
    torch.testing.assert_close(got.double(), scores.softmax(3) @ v.double(), rtol=5e-2, atol=5e-2)


def test_batch_norm_keeps_fp32_statistics():
    torch.manual_seed(0)
    ours, stock = BatchNorm2d(6), nn.BatchNorm2d(6)
    x = 3 + 50 * torch.randn(4, 6, 5, 5)
    for module in (ours, stock):
        nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    ours.to(torch.bfloat16)
    assert ours.weight.dtype == torch.bfloat16
    for _ in range(3):
        low = ours(x.bfloat16())
        full = stock(x.bfloat16().float())
    assert low.dtype == torch.bfloat16 and ours.running_mean.dtype == torch.float32
    assert ours.num_batches_tracked == 3
    torch.testing.assert_close(ours.running_mean, stock.running_mean, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.running_var, stock.running_var, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(low.float(), full, rtol=2e-2, atol=2e-2)
    ours.eval(), stock.eval()
    torch.testing.assert_close(
        ours(x.bfloat16()).float(), stock(x.bfloat16().float()), rtol=2e-2, atol=3e-2
    )
    assert ours.double().running_var.dtype == torch.float64


def peer_by_loops(name, q, k, v):
    """One head of each attention of Table 8, from its paper's formula, token by token."""
    n = len(q)
    if name == "xca":
        scores = (k / k.norm(dim=0)).T @ (q / q.norm(dim=0))
        return v @ (scores.exp() / scores.exp().sum(0))
    if name == "efficient":
        q, k = q.exp() / q.exp().sum(1, keepdim=True), k.exp() / k.exp().sum(0)
        return torch.stack([sum((q[i] @ k[j]) * v[j] for j in range(n)) for i in range(n)])
    if name == "sima":
        q, k = q / q.abs().sum(0), k / k.abs().sum(0)
        return torch.stack([sum((q[i] @ k[j]) * v[j] for j in range(n)) for i in range(n)])
    feature = {"leaky": lambda t: torch.where(t < 0, 0.01 * t, t)}.get(name, lambda t: t.clamp(0))
    q, k = feature(q), feature(k)
    rows = []
    for i in range(n):
        scores = [q[i] @ k[j] for j in range(n)]
        if name == "cosformer":
            scores = [s * math.cos(math.pi / 2 * (i - j) / n) for j, s in enumerate(scores)]
        rows.append(sum(s * v[j] for j, s in enumerate(scores)) / (sum(scores) or 1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["xca", "efficient", "sima", "linear", "leaky", "cosformer"])
def test_attentions_of_table_8(name):
    torch.manual_seed(0)
    core = ATTENTIONS[name](AttentionSpec(12, 3, (3, 3), prefix=1)).double()
    q, k, v = torch.randn(3, 2, 10, 12, dtype=torch.float64).unbind(0)
    expected = torch.stack(
        [
            torch.cat([peer_by_loops(name, *(t[b, :, g : g + 4] for t in (q, k, v)))
                       for g in (0, 4, 8)], 1)
            for b in range(2)
        ]
    )  # fmt: skip
    got = core(q, k, v, (3, 3), q)
    torch.testing.assert_close(got, expected)
    if name != "xca":
        weighed = core.weights(q, k) @ v.view(2, 10, 3, 4).transpose(1, 2)
        torch.testing.assert_close(weighed.transpose(1, 2).flatten(2), expected)
        core.order = "qk"
        torch.testing.assert_close(core(q, k, v, (3, 3), q), expected)


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LinearAttention(32, 1)(torch.randn(1, 150, 32)).sum().backward()
        Mlp(4, 8)(torch.randn(1, 3, 3, 4))


def test_batch_norm_where_half_precision_is_the_default():
    """A model made so (transformers does), or given the tensors of a half-precision file."""
    torch.manual_seed(0)
    stock, x = nn.BatchNorm2d(6), torch.randn(4, 6, 5, 5)
    stock(x)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        ours = BatchNorm2d(6)
    finally:
        torch.set_default_dtype(before)
    for state in (ours.state_dict(), stock.bfloat16().state_dict()):
        ours.load_state_dict(state, assign=True)
        assert ours.running_mean.dtype == ours.running_var.dtype == torch.float32
        assert ours.weight.dtype == torch.bfloat16 and ours(x.bfloat16()).isfinite().all()
    expected = stock.eval()(x.bfloat16())
    ours.load_state_dict(stock.state_dict(), assign=True)
    torch.testing.assert_close(ours.eval()(x.bfloat16()), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16])
def test_a_scaled_branch_as_pytorchs_product_and_sum(branch):
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, 8, requires_grad=True)
    y = torch.randn(3, 2, 2, 8).to(branch).requires_grad_()
    factor = torch.tensor([0.0, 1.25, 2.0]).view(-1, 1, 1, 1)
    upstream = torch.randn(x.shape)
    outputs = (ops.add_scaled(x, y, factor), x + y * factor)
    torch.testing.assert_close(*outputs)
    found, expected = (torch.autograd.grad(out, (x, y), upstream) for out in outputs)
    torch.testing.assert_close(found, expected)
