"""The core of linear attention (eq. 4 with ReLU, clamp and scale), between its two projections.

``combine`` is the definition: short, differentiable any number of times, understood by compilers
and exporters. ``_ByHeads`` is the same on a CPU without the copies: batched matrix products read
the heads in place from the fused projection, whatever the stride.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from l2vit.models import kernels
from l2vit.models.tracing import eager

_WORTH_IT = 128  # tokens from which the product saves more than a Python loop over heads costs
_KERNEL_WIDTHS = (16, 32)  # head widths that the Triton kernels are written for
Observer = Callable[[Tensor], None]


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products over all tokens are accumulated in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """relu(q), relu(k), v, each (B, heads, N, d), from the fused projection (B, N, 3·heads·d)."""
    b, n, width = qkv.shape
    parts = qkv.view(b, n, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    q, k, v = parts.unbind(0)
    return F.relu(q), F.relu(k), v


def factor(
    q: Tensor, k: Tensor, scale: Tensor | None, clamp: float, observer: Observer | None
) -> Tensor:
    """scale / max(q · Σ k, clamp), (B, heads, N, 1), for q, k (B, heads, N, d) after ReLU."""
    accurate = accurate_dtype(q.dtype)
    total = k.sum(2, keepdim=True, dtype=accurate).transpose(2, 3)
    denominator = q.to(accurate) @ total
    if observer is not None:
        observer(denominator.detach())
    numerator = 1.0 if scale is None else scale.to(accurate)
    return numerator / denominator.clamp(min=clamp)


def combine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    clamp: float,
    *,
    qk_first: bool = False,
    observer: Observer | None = None,
) -> Tensor:
    """Linear attention by its formula, for q (B, heads, N, d) and k, v (B, heads, n, d).

    Args:
        q, k: after ReLU.
        scale: (heads, 1, 1), or None for 1.
        clamp: lower bound of the denominator.
        qk_first: multiply (q kᵀ) v instead of q (kᵀ v): the same result.
        observer: called with the unclamped denominators (B, heads, N, 1), at least fp32.

    Returns:
        (B, heads, N, d) in the precision of ``v``.
    """
    dtype = v.dtype
    weight = factor(q, k, scale, clamp, observer)
    q, k, v = (t.to(weight.dtype) for t in (q, k, v))
    out = (q @ k.transpose(2, 3)) @ v if qk_first else q @ (k.transpose(2, 3) @ v)
    return (out * weight).to(dtype)


def plain(qkv: Tensor, scale: Tensor | None, heads: int, clamp: float, **how: Any) -> Tensor:
    """:func:`combine` from the fused projection (B, N, 3·C) to (B, N, C)."""
    b, n, width = qkv.shape
    out = combine(*split_heads(qkv, heads), scale, clamp, **how)
    return out.transpose(1, 2).reshape(b, n, width // 3)


def linear_attention(
    qkv: Tensor,
    scale: Tensor | None,
    heads: int,
    clamp: float,
    *,
    qk_first: bool = False,
    observer: Observer | None = None,
) -> Tensor:
    """:func:`plain` by the fastest way there is for the device at hand; same arguments."""
    fused = not torch.jit.is_tracing() and not qk_first and observer is None
    fused = fused and qkv.shape[2] // (3 * heads) in _KERNEL_WIDTHS
    if fused and kernels.chosen("linear_attention", qkv):
        return torch.ops.l2vit.linear_attention(qkv, scale, heads, clamp)[0]
    direct = eager() and qkv.device.type == "cpu" and observer is None and not qk_first
    if direct and qkv.shape[1] >= _WORTH_IT:
        return _ByHeads.apply(qkv, scale, heads, clamp)
    return plain(qkv, scale, heads, clamp, qk_first=qk_first, observer=observer)


class _ByHeads(torch.autograd.Function):
    """``combine`` head by head. Sum of k and normaliser ride along as a 33rd column of kᵀ v, so
    one product gives numerators and denominators. Keeps qkv alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: Tensor | None, heads: int, clamp: float) -> Tensor:
        b, n, width = qkv.shape
        d = width // (3 * heads)
        accurate = accurate_dtype(qkv.dtype)
        out = qkv.new_empty(b, n, heads * d)
        context = qkv.new_empty(heads, b, d, d + 1, dtype=accurate)
        for head in range(heads):
            q, k, v = _head(qkv, head, heads, accurate)
            k.relu_()
            context[head, :, :, :d] = k.transpose(1, 2) @ v
            context[head, :, :, d] = k.sum(1)
            mixed = q.relu_() @ context[head]
            weight = mixed[..., d:].clamp(min=clamp).reciprocal_()
            if scale is not None:
                weight *= scale[head].to(accurate)
            out[:, :, head * d : (head + 1) * d] = mixed[..., :d].mul_(weight)
        ctx.save_for_backward(qkv, scale, context)
        ctx.heads, ctx.clamp = heads, clamp
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        qkv, scale, context = ctx.saved_tensors
        heads, width = ctx.heads, qkv.shape[2]
        d = width // (3 * heads)
        accurate = context.dtype
        grad_qkv = torch.empty_like(qkv)
        grad_scale = None if scale is None else torch.zeros_like(scale)
        for head in range(heads):
            q, k, v = _head(qkv, head, heads, accurate)
            q.relu_()
            k.relu_()
            part = grad[:, :, head * d : (head + 1) * d].to(accurate)
            mixed = q @ context[head]
            inverse = mixed[..., d:].clamp(min=ctx.clamp).reciprocal_()
            kept = mixed[..., d:] >= ctx.clamp
            s = 1.0 if scale is None else scale[head].to(accurate)
            along = (part * mixed[..., :d]).sum(2, keepdim=True).mul_(inverse)
            if grad_scale is not None:
                grad_scale[head] = along.sum()
            # Gradients of the numerators and, in the last column, of the denominators.
            torch.mul(part, inverse * s, out=mixed[..., :d])
            torch.mul(along.mul_(inverse), kept * -s, out=mixed[..., d:])
            grad_context = q.transpose(1, 2) @ mixed
            grad_q = mixed @ context[head].transpose(1, 2)
            grad_k = torch.baddbmm(
                grad_context[..., d].unsqueeze(1), v, grad_context[..., :d].transpose(1, 2)
            )
            columns = grad_qkv.view(*qkv.shape[:2], 3, heads, d)[:, :, :, head]
            columns[:, :, 0] = grad_q.mul_(q > 0)
            columns[:, :, 1] = grad_k.mul_(k > 0)
            columns[:, :, 2] = k @ grad_context[..., :d]
        return grad_qkv, grad_scale, None, None


def _head(qkv: Tensor, head: int, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of one head as fresh (B, N, d) tensors, and v, a view where the type allows."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, heads, -1)[:, :, :, head].unbind(2)
    memory = torch.contiguous_format
    return (
        q.to(dtype, copy=True, memory_format=memory),
        k.to(dtype, copy=True, memory_format=memory),
        v.to(dtype),
    )
