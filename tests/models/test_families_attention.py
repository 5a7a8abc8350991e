"""The attention cores against their formulas, and what the papers say of them."""

import families_reference as reference
import pytest
import torch
import torch.nn.functional as F

from l2vit.models.families.attention import AttentionSpec, SoftmaxAttention
from l2vit.models.families.base import ATTENTIONS, FusedProjected, linear_blocks
from l2vit.models.families.focused import FocusedAttention, focus
from l2vit.models.families.injective import InjectiveAttention

SIDE, DIM, HEADS = 4, 12, 3


def tensors(tokens, keys=None, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    make = [
        torch.randn(2, count, DIM, generator=generator, dtype=torch.float64) * scale
        for count in (tokens, keys or tokens, keys or tokens, keys or tokens)
    ]
    return [t.to(dtype) for t in make]


def focused_core(prefix=0, keys=0):
    torch.manual_seed(0)
    core = FocusedAttention(
        AttentionSpec(DIM, HEADS, (SIDE, SIDE), prefix=prefix, keys=keys)
    ).double()
    for table in (core.scale, core.positional_encoding):
        torch.nn.init.normal_(table, std=0.5)
    return core


def injective_core(prefix=0):
    torch.manual_seed(0)
    return InjectiveAttention(AttentionSpec(DIM, HEADS, (SIDE, SIDE), prefix=prefix)).double()


@pytest.mark.parametrize("keys", [16, 4], ids=["all keys", "reduced keys"])
def test_focused_equals_its_formula(keys):
    """With n < N, v is stretched along the tokens for the convolution."""
    core = focused_core(keys=keys)
    q, k, v, source = tensors(16, keys)
    answer = core(q, k, v, (SIDE, SIDE), source)
    for i in range(2):
        weights = dict(core.state_dict())
        expected = reference.focused(q[i], k[i], v[i], weights, "", HEADS, SIDE)
        torch.testing.assert_close(answer[i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1])
def test_injective_equals_its_formula(prefix):
    core = injective_core(prefix)
    q, k, v, source = tensors(16 + prefix)
    answer = core(q, k, v, (SIDE, SIDE), source)
    for i in range(2):
        weights = dict(core.state_dict())
        arguments = (q[i], k[i], v[i], source[i], weights, "", HEADS, SIDE, prefix)
        torch.testing.assert_close(
            answer[i], reference.injective(*arguments), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("name", ATTENTIONS)
def test_gradients_in_float64(name):
    torch.manual_seed(0)
    core = ATTENTIONS[name](AttentionSpec(DIM, HEADS, (SIDE, SIDE), prefix=1)).double()
    inputs = [t.requires_grad_() for t in tensors(17)]
    parameters = list(core.parameters())

    def function(q, k, v, source, *_):
        return core(q, k, v, (SIDE, SIDE), source)

    assert torch.autograd.gradcheck(function, (*inputs, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", [n for n in ATTENTIONS if n != "xca"])  # it weighs channels
def test_attention_map_is_what_weighs_the_values(name):
    """Rows of the map times v, plus what the convolution beside it adds, is the output."""
    torch.manual_seed(0)
    core = ATTENTIONS[name](AttentionSpec(DIM, HEADS, (SIDE, SIDE))).double()
    attention = FusedProjected(DIM, core).double()
    x = torch.randn(2, SIDE, SIDE, DIM, dtype=torch.float64)
    q, k, v = attention.project(x.flatten(1, 2), (SIDE, SIDE))
    heads = attention.attention_map(x) @ v.view(2, 16, HEADS, -1).transpose(1, 2)
    out = heads.transpose(1, 2).reshape(2, 16, DIM)
    if isinstance(core, FocusedAttention):
        out = out + core.local(v, (SIDE, SIDE))
    if isinstance(core, InjectiveAttention):
        out = out + core.local(v, (SIDE, SIDE), x.flatten(1, 2))
    torch.testing.assert_close(core(q, k, v, (SIDE, SIDE), x.flatten(1, 2)), out)


def test_focusing_keeps_the_length_and_scales():
    t = torch.rand(5, 7, dtype=torch.float64) + 1e-3
    torch.testing.assert_close(focus(t).norm(dim=-1), t.norm(dim=-1))
    torch.testing.assert_close(focus(11 * t), 11 * focus(t))
    torch.testing.assert_close(
        focus(t), t**3 * t.norm(dim=-1, keepdim=True) / (t**3).norm(dim=-1, keepdim=True)
    )
    zero = focus(torch.full((1, 64), 1e-6 / 5.0))  # an all-zero token after the 1e-6, in fp32
    torch.testing.assert_close(zero, torch.full((1, 64), 1e-6 / 5.0))


def test_sums_of_the_weights():
    q, k, _, _ = tensors(16)
    core = focused_core()
    focused_q, focused_k = core.features(q, k)
    inner = (focused_q * focused_k.mean(2, keepdim=True)).sum(-1)
    torch.testing.assert_close(core.weights(q, k).sum(-1), inner / (inner + 1e-6))
    torch.testing.assert_close(
        injective_core().weights(q, k).sum(-1), torch.ones(2, HEADS, 16, dtype=torch.float64)
    )
    seen = []
    core.observer = seen.append
    core(q, k, q, (SIDE, SIDE), q)
    torch.testing.assert_close(seen[0].squeeze(-1), inner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["focused", "injective", "enhanced"])
def test_half_precision_stays_near(name, dtype):
    """3,136 tokens of size 10: Σ k vᵀ and q³ leave fp16 unless scaled."""
    torch.manual_seed(0)
    core = ATTENTIONS[name](AttentionSpec(DIM, HEADS, (56, 56)))
    q, k, v, source = (10 * torch.rand(1, 3136, DIM) for _ in range(4))
    with torch.no_grad():
        expected = core(q, k, v, (56, 56), source)
        half = core.to(dtype)(*(t.to(dtype) for t in (q, k, v)), (56, 56), source.to(dtype))
        with torch.autocast("cpu", dtype):
            mixed = core.float()(q, k, v, (56, 56), source)
    scale = expected.abs().max()
    tolerance = 0.02 if dtype == torch.float16 else 0.1
    for found in (half, mixed):
        assert (found.float() - expected).abs().max() < tolerance * scale


def test_all_zero_tokens_in_half_precision():
    core = FocusedAttention(AttentionSpec(DIM, HEADS, (SIDE, SIDE))).half()
    q = torch.zeros(1, 16, DIM, dtype=torch.float16, requires_grad=True)
    out = core(q, q, q + 1, (SIDE, SIDE), q)
    out.float().sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(q.grad).all()


@pytest.mark.parametrize("weak", [0.0, 1e-3, 1e-2], ids=["dead", "thousandth", "hundredth"])
def test_weak_keys_in_half_precision(weak):
    """Cubing makes a head whose keys are a hundredth of the others' a millionth: in fp16 its
    queries over their denominators overflowed, and infinity times nothing is no number."""
    core = focused_core()
    torch.nn.init.zeros_(core.positional_encoding)
    q, k, v, source = tensors(16)
    k = torch.cat([k[..., :4].abs() * weak, k[..., 4:]], 2)
    given = [t.half().requires_grad_() for t in (q, k, v)]
    half = FocusedAttention(AttentionSpec(DIM, HEADS, (SIDE, SIDE))).half()
    half.load_state_dict(core.state_dict())
    answer = half(*given, (SIDE, SIDE), source.half())
    answer.float().square().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (*given, *half.parameters()))
    weights = {name: value.double() for name, value in half.state_dict().items()}
    for i in range(2):
        exact = [t[i].detach().double() for t in given]
        expected = reference.focused(*exact, weights, "", HEADS, SIDE)
        torch.testing.assert_close(answer[i].double(), expected, rtol=5e-3, atol=5e-3)


def test_softmax_is_the_textbook_one():
    q, k, v, source = tensors(16, 4)
    answer = SoftmaxAttention(AttentionSpec(DIM, HEADS, (SIDE, SIDE), keys=4))(
        q, k, v, (SIDE, SIDE), source
    )
    expected = torch.stack(
        [reference.softmax(a, b, c, HEADS) for a, b, c in zip(q, k, v, strict=True)]
    )
    torch.testing.assert_close(answer, expected)


def test_which_blocks_are_linear():
    depths = (2, 2, 18, 2)
    assert linear_blocks("LLSS", depths) == [[True] * 2, [True] * 2, [False] * 18, [False] * 2]
    mixed = linear_blocks("IIMS2", depths)[2]
    assert mixed == [True, True] + [False] * 16


def test_large_values_of_the_enhanced_core_are_clamped_below_100():
    """L²ViT's own rule holds in other backbones, too: tiny denominators count as 100."""
    core = ATTENTIONS["enhanced"](AttentionSpec(DIM, HEADS, (SIDE, SIDE))).double()
    q, k, v, source = tensors(16, scale=1e-2)
    answer = core(q, k, v, (SIDE, SIDE), source)
    parts = [t.view(2, 16, HEADS, -1).transpose(1, 2) for t in (F.relu(q), F.relu(k), v)]
    products = parts[0] @ parts[1].transpose(2, 3) @ parts[2] * 4**-0.5 / 100
    torch.testing.assert_close(answer, products.transpose(1, 2).reshape(2, 16, DIM))
