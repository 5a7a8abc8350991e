"""Linear attention between its projections, fused: out = s · q (kᵀ v) / max(q · Σ k, clamp).

Forward and backward read the fused projection (B, N, 3·heads·d) and write in its layout. Sums over
tokens are cut into parts that a second step adds in a fixed order: no atomics, so a run repeats bit
for bit. Everything is accumulated in fp32. The context, kᵀ v and Σ k, is all that the backward pass
keeps beside the input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2vit.models.ops.reference import linear_attention as linear_attention_reference

_BLOCK = 32  # tokens at a time
_QUERY_BLOCK = 16  # in the query's gradient: with 32 it spills at 128 registers a thread
_PROGRAMS = 512  # enough to fill a GPU


@triton.jit
def _tokens(index: tl.tensor, tokens: tl.tensor, BLOCK: tl.constexpr) -> tl.tuple:
    rows = index * BLOCK + tl.arange(0, BLOCK)
    return rows.to(tl.int64)[:, None], (rows < tokens)[:, None]


@triton.jit
def _at_least(x: tl.tensor, bound: tl.tensor) -> tl.tensor:
    """As PyTorch has it, NaN stays NaN: a lost run must not look healthy."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def context_kernel(
    qkv: tl.tensor,
    context: tl.tensor,
    total: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    blocks: tl.tensor,
    splits: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """kᵀ v and Σ k of ``blocks`` blocks of tokens. Grid (B·heads, splits)."""
    pair, split = tl.program_id(0), tl.program_id(1)
    width = heads * D
    columns = tl.arange(0, D)
    start = qkv + (pair // heads).to(tl.int64) * tokens * 3 * width + (pair % heads) * D
    product = tl.zeros((D, D), tl.float32)
    summed = tl.zeros((D,), tl.float32)
    for index in range(split * blocks, (split + 1) * blocks):
        rows, valid = _tokens(index, tokens, BLOCK)
        at = start + rows * 3 * width + columns[None, :]
        k = _at_least(tl.load(at + width, mask=valid, other=0.0).to(tl.float32), 0.0)
        v = tl.load(at + 2 * width, mask=valid, other=0.0).to(tl.float32)
        product += tl.dot(tl.trans(k), v, input_precision=PRECISION)
        summed += tl.sum(k, 0)
    part = pair.to(tl.int64) * splits + split
    square = columns[:, None] * D + columns[None, :]
    tl.store(context + part * D * D + square, product)
    tl.store(total + part * D + columns, summed)


@triton.jit
def out_kernel(
    qkv: tl.tensor,
    scale: tl.tensor,
    context: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    clamp: tl.tensor,
    HAS_SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The output of one block of tokens. Grid (B·heads, blocks)."""
    pair = tl.program_id(0).to(tl.int64)
    width = heads * D
    columns = tl.arange(0, D)
    first = (pair // heads) * tokens
    rows, valid = _tokens(tl.program_id(1), tokens, BLOCK)
    at = (first + rows) * width + (pair % heads) * D + columns[None, :]
    q = tl.load(qkv + at + (first + rows) * 2 * width, mask=valid, other=0.0).to(tl.float32)
    q = _at_least(q, 0.0)
    product = tl.load(context + pair * D * D + columns[:, None] * D + columns[None, :])
    summed = tl.load(total + pair * D + columns)
    weight = 1.0 / _at_least(tl.sum(q * summed[None, :], 1), clamp)
    if HAS_SCALE:
        weight *= tl.load(scale + pair % heads).to(tl.float32)
    mixed = tl.dot(q, product, input_precision=PRECISION) * weight[:, None]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=valid)


@triton.jit
def query_gradient_kernel(
    qkv: tl.tensor,
    scale: tl.tensor,
    context: tl.tensor,
    total: tl.tensor,
    grad: tl.tensor,
    grad_qkv: tl.tensor,
    grad_context: tl.tensor,
    grad_total: tl.tensor,
    grad_scale: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    clamp: tl.tensor,
    blocks: tl.tensor,
    splits: tl.tensor,
    HAS_SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Gradients of q, and parts of those of kᵀ v, Σ k and the scale. Grid (B·heads, splits)."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width = heads * D
    columns = tl.arange(0, D)
    first = (pair // heads) * tokens
    square = columns[:, None] * D + columns[None, :]
    product = tl.load(context + pair * D * D + square)
    summed = tl.load(total + pair * D + columns)
    factor = 1.0
    if HAS_SCALE:
        factor = tl.load(scale + pair % heads).to(tl.float32)
    grad_product = tl.zeros((D, D), tl.float32)
    grad_summed = tl.zeros((D,), tl.float32)
    grad_factor = tl.zeros((BLOCK,), tl.float32)
    for index in range(split * blocks, (split + 1) * blocks):
        rows, valid = _tokens(index, tokens, BLOCK)
        at = (first + rows) * width + (pair % heads) * D + columns[None, :]
        fused = at + (first + rows) * 2 * width
        q = _at_least(tl.load(qkv + fused, mask=valid, other=0.0).to(tl.float32), 0.0)
        upstream = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        denominator = tl.sum(q * summed[None, :], 1)
        inverse = 1.0 / _at_least(denominator, clamp)
        # upstream · (q kᵀv) = q · (upstream (kᵀv)ᵀ): the gradient's product serves both.
        through = tl.dot(upstream, tl.trans(product), input_precision=PRECISION)
        along = tl.sum(q * through, 1) * inverse
        grad_factor += along
        grad_mixed = upstream * (inverse * factor)[:, None]
        grad_denominator = tl.where(denominator >= clamp, -factor * along * inverse, 0.0)
        grad_q = through * (inverse * factor)[:, None]
        grad_q += grad_denominator[:, None] * summed[None, :]
        grad_q = tl.where(q == 0, 0.0, grad_q)
        tl.store(grad_qkv + fused, grad_q.to(grad_qkv.dtype.element_ty), mask=valid)
        grad_product += tl.dot(tl.trans(q), grad_mixed, input_precision=PRECISION)
        grad_summed += tl.sum(q * grad_denominator[:, None], 0)
    part = pair * splits + split
    tl.store(grad_context + part * D * D + square, grad_product)
    tl.store(grad_total + part * D + columns, grad_summed)
    tl.store(grad_scale + part, tl.sum(grad_factor, 0))


@triton.jit
def key_value_gradient_kernel(
    qkv: tl.tensor,
    grad_context: tl.tensor,
    grad_total: tl.tensor,
    grad_qkv: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Gradients of k and v of one block of tokens. Grid (B·heads, blocks)."""
    pair = tl.program_id(0).to(tl.int64)
    width = heads * D
    columns = tl.arange(0, D)
    rows, valid = _tokens(tl.program_id(1), tokens, BLOCK)
    at = ((pair // heads) * tokens + rows) * 3 * width + (pair % heads) * D + columns[None, :]
    k = _at_least(tl.load(qkv + at + width, mask=valid, other=0.0).to(tl.float32), 0.0)
    v = tl.load(qkv + at + 2 * width, mask=valid, other=0.0).to(tl.float32)
    product = tl.load(grad_context + pair * D * D + columns[:, None] * D + columns[None, :])
    summed = tl.load(grad_total + pair * D + columns)
    grad_k = tl.dot(v, tl.trans(product), input_precision=PRECISION) + summed[None, :]
    grad_k = tl.where(k == 0, 0.0, grad_k)
    grad_v = tl.dot(k, product, input_precision=PRECISION)
    kind = grad_qkv.dtype.element_ty
    tl.store(grad_qkv + at + width, grad_k.to(kind), mask=valid)
    tl.store(grad_qkv + at + 2 * width, grad_v.to(kind), mask=valid)


def _plan(qkv: Tensor, heads: int) -> tuple[int, int, int, dict[str, Any]]:
    """Splits of the tokens, blocks in each, all blocks, and the constants of a launch.

    Half-precision inputs are multiplied as tf32: three bits finer than bf16, as fine as fp16, with
    the range of fp32. fp32 stays fp32.
    """
    b, n, width = qkv.shape
    every = triton.cdiv(n, _BLOCK)
    blocks = triton.cdiv(every, max(1, min(every, _PROGRAMS // (b * heads))))
    precision = "ieee" if qkv.dtype == torch.float32 else "tf32"
    constants = {"D": width // (3 * heads), "BLOCK": _BLOCK, "PRECISION": precision}
    return triton.cdiv(every, blocks), blocks, every, constants


def query_options(dtype: torch.dtype) -> dict[str, int]:
    """Of the query gradient's launch: no more registers than let 16 warps share a processor."""
    return {"num_warps": 4 if dtype == torch.float32 else 2, "num_stages": 1, "maxnreg": 128}


def _added(parts: Tensor) -> Tensor:
    """The sum over dimension 1; nothing to launch where there is one part."""
    return parts[:, 0] if parts.shape[1] == 1 else parts.sum(1)


@torch.library.custom_op("l2vit::linear_attention", mutates_args=())
def linear_attention(
    qkv: Tensor, scale: Tensor | None, heads: int, clamp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, N, heads·d), kᵀ v (B·heads, d, d) and Σ k (B·heads, d), the last two in fp32."""
    qkv, scale = qkv.contiguous(), scale if scale is None else scale.contiguous()
    b, n, width = qkv.shape
    splits, blocks, every, constants = _plan(qkv, heads)
    d, pairs = constants["D"], b * heads
    out = qkv.new_empty(b, n, width // 3)
    context = qkv.new_empty(pairs, splits, d, d, dtype=torch.float32)
    total = qkv.new_empty(pairs, splits, d, dtype=torch.float32)
    with torch.cuda.device_of(qkv):  # where Triton launches
        context_kernel[(pairs, splits)](qkv, context, total, n, heads, blocks, splits, **constants)
        context, total = _added(context), _added(total)
        out_kernel[(pairs, every)](
            qkv,
            qkv if scale is None else scale,
            context,
            total,
            out,
            n,
            heads,
            clamp,
            HAS_SCALE=scale is not None,
            **constants,
        )
    return out, context, total


@linear_attention.register_fake
def _(qkv: Tensor, scale: Tensor | None, heads: int, clamp: float) -> tuple[Tensor, Tensor, Tensor]:
    b, n, width = qkv.shape
    d = width // (3 * heads)
    context = qkv.new_empty(b * heads, d, d, dtype=torch.float32)
    return qkv.new_empty(b, n, width // 3), context, context.new_empty(b * heads, d)


@torch.library.custom_op("l2vit::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    qkv: Tensor,
    scale: Tensor | None,
    context: Tensor,
    total: Tensor,
    grad: Tensor,
    heads: int,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, in its layout, and of the scale, (heads, 1, 1) in fp32."""
    qkv, grad = qkv.contiguous(), grad.contiguous()
    scale = scale if scale is None else scale.contiguous()
    b, n, _ = qkv.shape
    splits, blocks, every, constants = _plan(qkv, heads)
    d, pairs = constants["D"], b * heads
    grad_qkv = torch.empty_like(qkv)
    grad_context = context.new_empty(pairs, splits, d, d)
    grad_total = context.new_empty(pairs, splits, d)
    grad_scale = context.new_empty(pairs, splits)
    query = constants | {"BLOCK": _QUERY_BLOCK}
    with torch.cuda.device_of(qkv):  # where Triton launches
        query_gradient_kernel[(pairs, splits)](
            qkv,
            qkv if scale is None else scale,
            context,
            total,
            grad,
            grad_qkv,
            grad_context,
            grad_total,
            grad_scale,
            n,
            heads,
            clamp,
            blocks * (_BLOCK // _QUERY_BLOCK),
            splits,
            HAS_SCALE=scale is not None,
            **query,
            **query_options(qkv.dtype),
        )
        grad_context, grad_total = _added(grad_context), _added(grad_total)
        key_value_gradient_kernel[(pairs, every)](
            qkv, grad_context, grad_total, grad_qkv, n, heads, **constants
        )
    return grad_qkv, grad_scale.view(b, heads, splits).sum((0, 2)).view(heads, 1, 1)


@linear_attention_backward.register_fake
def _(
    qkv: Tensor,
    scale: Tensor | None,
    context: Tensor,
    total: Tensor,
    grad: Tensor,
    heads: int,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    empty = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return empty, context.new_empty(heads, 1, 1)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, scale, ctx.heads, ctx.clamp = inputs
    ctx.save_for_backward(qkv, scale, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else they get gradients of zeros


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor, Tensor | None, None, None]:
    qkv, scale, context, total = ctx.saved_tensors
    grad_qkv, grad_scale = torch.ops.l2vit.linear_attention_backward(
        qkv, scale, context, total, grad, ctx.heads, ctx.clamp
    )
    return grad_qkv, None if scale is None else grad_scale.to(scale.dtype), None, None


linear_attention.register_autograd(_backward, setup_context=_keep)


def check(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of a tiny input by the kernels and by the formula."""
    heads, clamp = 2, 700.0
    qkv = torch.randn(2, 70, 6 * 32, device=device, dtype=dtype, requires_grad=True)
    scale = torch.rand(heads, 1, 1, device=device, requires_grad=True)
    upstream = torch.randn(2, 70, 2 * 32, device=device, dtype=dtype)
    mine = torch.ops.l2vit.linear_attention(qkv, scale, heads, clamp)[0]
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    theirs = linear_attention_reference(q, k, v, scale, clamp).transpose(1, 2).flatten(2)
    return tuple(  # type: ignore[return-value]
        [out.detach(), *torch.autograd.grad(out, (qkv, scale), upstream)] for out in (mine, theirs)
    )
