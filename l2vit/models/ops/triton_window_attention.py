"""Softmax attention inside the windows of a map, read from the fused projection as it lies.

A program takes one window and one head of (B, H, W, 3·C): its tokens' q, k and v are rows of the
map, so windows are neither cut out nor put back. In half precision windows of up to 64 tokens are
one block; larger ones are taken in blocks with a running maximum. Products are accumulated in
fp32. No atomics, so a run repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2vit.models.ops import reference, windows

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _product(a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """a b in fp32; Triton's interpreter cannot multiply bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _corner(
    window: tl.tensor, height: tl.tensor, width: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:
    """Place of a window's first token among the tokens of all maps."""
    down, right = height // SIZE, width // SIZE
    image = window // (down * right)
    row, column = window % (down * right) // right, window % right
    return (image.to(tl.int64) * height + row * SIZE) * width + column * SIZE


@triton.jit
def _tokens(
    block: tl.tensor, width: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tuple:
    """Places of a block's tokens beside the window's first one, and which of them exist."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    return (token // SIZE) * width + token % SIZE, token < SIZE * SIZE


@triton.jit
def _load(start: tl.tensor, place: tl.tensor, row: tl.tensor, D: tl.constexpr) -> tl.tensor:
    at = place[0][:, None] * row + tl.arange(0, D)[None, :]
    return tl.load(start + at, mask=place[1][:, None], other=0.0)


@triton.jit
def _store(start: tl.tensor, place: tl.tensor, row: tl.tensor, value: tl.tensor) -> None:
    at = place[0][:, None] * row + tl.arange(0, value.shape[1])[None, :]
    tl.store(start + at, value.to(start.dtype.element_ty), mask=place[1][:, None])


@triton.jit
def window_attention_kernel(
    qkv: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    heads: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One block of queries of a window and head. Grid (windows·heads, blocks).

    ``factor`` is log2(e)/√D: everything is in powers of two.
    """
    pair = tl.program_id(0)
    head, row = pair % heads, heads * D
    first = _corner(pair // heads, height, width, SIZE)
    start = qkv + first * 3 * row + head * D
    queries = _tokens(tl.program_id(1), width, SIZE, BLOCK)
    q = _load(start, queries, 3 * row, D)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, D), tl.float32)
    for block in range((SIZE * SIZE + BLOCK - 1) // BLOCK):
        keys = _tokens(block, width, SIZE, BLOCK)
        k = _load(start + row, keys, 3 * row, D)
        v = _load(start + 2 * row, keys, 3 * row, D)
        scores = _product(q, tl.trans(k), PRECISION) * factor
        scores = tl.where(keys[1][None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(weights, 1)
        mixed *= shrink[:, None]
        mixed += _product(weights.to(v.dtype), v, PRECISION)
        most = higher
    _store(out + first * row + head * D, queries, row, mixed / total[:, None])
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = pair.to(tl.int64) * (SIZE * SIZE) + token
    tl.store(lse + at, most + tl.log2(total), mask=queries[1])


@triton.jit
def _weights(
    q: tl.tensor,
    k: tl.tensor,
    lse: tl.tensor,
    exists: tl.tensor,
    factor: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """softmax(q kᵀ / √d) once more; 0 at keys that do not exist."""
    scores = _product(q, tl.trans(k), PRECISION) * factor
    return tl.where(exists[None, :], tl.exp2(scores - lse[:, None]), 0.0)


@triton.jit
def window_gradient_kernel(
    qkv: tl.tensor,
    lse: tl.tensor,
    grad: tl.tensor,
    grad_qkv: tl.tensor,
    heads: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Gradients of q, k and v of a window of one block and a head. Grid (windows·heads)."""
    pair = tl.program_id(0)
    head, row = pair % heads, heads * D
    first = _corner(pair // heads, height, width, SIZE)
    start = qkv + first * 3 * row + head * D
    into = grad_qkv + first * 3 * row + head * D
    all_tokens = _tokens(0, width, SIZE, BLOCK)
    token = tl.arange(0, BLOCK)
    sums = tl.load(lse + pair.to(tl.int64) * (SIZE * SIZE) + token, mask=all_tokens[1], other=0.0)
    q = _load(start, all_tokens, 3 * row, D)
    k = _load(start + row, all_tokens, 3 * row, D)
    v = _load(start + 2 * row, all_tokens, 3 * row, D)
    upstream = _load(grad + first * row + head * D, all_tokens, row, D)
    weights = _weights(q, k, sums, all_tokens[1], factor, PRECISION)
    grad_v = _product(tl.trans(weights.to(v.dtype)), upstream, PRECISION)
    _store(into + 2 * row, all_tokens, 3 * row, grad_v)
    grad_weights = _product(upstream, tl.trans(v), PRECISION)
    along = tl.sum(weights * grad_weights, 1)
    grad_scores = (weights * (grad_weights - along[:, None]) * (factor / LOG2_E)).to(q.dtype)
    _store(into, all_tokens, 3 * row, _product(grad_scores, k, PRECISION))
    grad_k = _product(tl.trans(grad_scores), q, PRECISION)
    _store(into + row, all_tokens, 3 * row, grad_k)


@triton.jit
def window_gradient_in_blocks_kernel(
    qkv: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    grad: tl.tensor,
    grad_qkv: tl.tensor,
    heads: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """As ``window_gradient_kernel`` for one block of a larger window, first as keys and values,
    then as queries. Grid (windows·heads, blocks)."""
    pair = tl.program_id(0)
    head, row = pair % heads, heads * D
    first = _corner(pair // heads, height, width, SIZE)
    start = qkv + first * 3 * row + head * D
    into = grad_qkv + first * 3 * row + head * D
    down = grad + first * row + head * D
    past = out + first * row + head * D
    sums_at = lse + pair.to(tl.int64) * (SIZE * SIZE) + tl.arange(0, BLOCK)
    mine = _tokens(tl.program_id(1), width, SIZE, BLOCK)
    blocks: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    k = _load(start + row, mine, 3 * row, D)
    v = _load(start + 2 * row, mine, 3 * row, D)
    grad_k = tl.zeros((BLOCK, D), tl.float32)
    grad_v = tl.zeros((BLOCK, D), tl.float32)
    for block in range(blocks):
        other = _tokens(block, width, SIZE, BLOCK)
        q = _load(start, other, 3 * row, D)
        upstream = _load(down, other, row, D)
        sums = tl.load(sums_at + block * BLOCK, mask=other[1], other=0.0)
        weights = _weights(q, k, sums, mine[1], factor, PRECISION)
        grad_v += _product(tl.trans(weights.to(v.dtype)), upstream, PRECISION)
        mixed = _load(past, other, row, D).to(tl.float32)
        along = tl.sum(upstream.to(tl.float32) * mixed, 1)
        grad_weights = _product(upstream, tl.trans(v), PRECISION)
        grad_scores = weights * (grad_weights - along[:, None]) * (factor / LOG2_E)
        grad_k += _product(tl.trans(grad_scores.to(q.dtype)), q, PRECISION)
    _store(into + row, mine, 3 * row, grad_k)
    _store(into + 2 * row, mine, 3 * row, grad_v)
    q = _load(start, mine, 3 * row, D)
    upstream = _load(down, mine, row, D)
    sums = tl.load(sums_at + tl.program_id(1) * BLOCK, mask=mine[1], other=0.0)
    mixed = _load(past, mine, row, D).to(tl.float32)
    along = tl.sum(upstream.to(tl.float32) * mixed, 1)
    grad_q = tl.zeros((BLOCK, D), tl.float32)
    for block in range(blocks):
        other = _tokens(block, width, SIZE, BLOCK)
        k = _load(start + row, other, 3 * row, D)
        v = _load(start + 2 * row, other, 3 * row, D)
        weights = _weights(q, k, sums, other[1], factor, PRECISION)
        grad_weights = _product(upstream, tl.trans(v), PRECISION)
        grad_scores = weights * (grad_weights - along[:, None]) * (factor / LOG2_E)
        grad_q += _product(grad_scores.to(k.dtype), k, PRECISION)
    _store(into, mine, 3 * row, grad_q)


def _plan(qkv: Tensor, heads: int, window: int) -> tuple[int, int, tuple[Any, ...], dict[str, Any]]:
    """Windows times heads, blocks in a window, and the arguments all kernels share."""
    b, h, w, width = qkv.shape
    d = width // (3 * heads)
    pairs = b * (h // window) * (w // window) * heads
    exact = qkv.dtype == torch.float32  # without matrix units: more registers a block
    block = 32 if exact else 64
    constants = {"SIZE": window, "D": d, "BLOCK": block, "PRECISION": "ieee" if exact else "tf32"}
    constants["num_stages"] = 1 if exact else 2
    factor = d**-0.5 * LOG2_E.value
    return pairs, triton.cdiv(window * window, block), (heads, h, w, factor), constants


@torch.library.custom_op("l2vit::window_attention", mutates_args=())
def window_attention(qkv: Tensor, heads: int, window: int) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, C), and log2 of the sums of each row's exponentials, (windows·heads, tokens)
    in fp32."""
    qkv = qkv.contiguous()
    pairs, blocks, sizes, constants = _plan(qkv, heads, window)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    lse = qkv.new_empty(pairs, window * window, dtype=torch.float32)
    with torch.cuda.device_of(qkv):  # where Triton launches
        window_attention_kernel[(pairs, blocks)](qkv, out, lse, *sizes, **constants)
    return out, lse


@window_attention.register_fake
def _(qkv: Tensor, heads: int, window: int) -> tuple[Tensor, Tensor]:
    b, h, w, width = qkv.shape
    pairs = b * (h // window) * (w // window) * heads
    lse = qkv.new_empty(pairs, window * window, dtype=torch.float32)
    return qkv.new_empty(b, h, w, width // 3), lse


@torch.library.custom_op("l2vit::window_attention_backward", mutates_args=())
def window_attention_backward(
    qkv: Tensor, out: Tensor, lse: Tensor, grad: Tensor, heads: int, window: int
) -> Tensor:
    """Gradient of qkv, in its layout."""
    qkv, grad = qkv.contiguous(), grad.contiguous()
    pairs, blocks, sizes, constants = _plan(qkv, heads, window)
    grad_qkv = torch.empty_like(qkv)
    with torch.cuda.device_of(qkv):  # where Triton launches
        if blocks == 1:
            window_gradient_kernel[(pairs,)](qkv, lse, grad, grad_qkv, *sizes, **constants)
        else:
            window_gradient_in_blocks_kernel[(pairs, blocks)](
                qkv, out, lse, grad, grad_qkv, *sizes, **constants
            )
    return grad_qkv


@window_attention_backward.register_fake
def _(qkv: Tensor, out: Tensor, lse: Tensor, grad: Tensor, heads: int, window: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.heads, ctx.window = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else the sums get a gradient of zeros


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor, None, None]:
    qkv, out, lse = ctx.saved_tensors
    call = torch.ops.l2vit.window_attention_backward
    return call(qkv, out, lse, grad, ctx.heads, ctx.window), None, None


window_attention.register_autograd(_backward, setup_context=_keep)


def plain(qkv: Tensor, heads: int, window: int) -> Tensor:
    """The same by the reference."""
    h, w = qkv.shape[1:3]
    tokens = windows.partition(qkv, window, window)
    q, k, v = tokens.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out = reference.softmax_attention(q, k, v, None)
    return windows.merge(out.transpose(1, 2).flatten(2), window, window, h, w)


def check(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradient of a tiny input by the kernels and by the formula, windows 7 and 12."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for window in (7, 12):
        shape = (2, window, 2 * window, 6 * 32)
        qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        upstream = torch.randn(*shape[:3], 2 * 32, device=device, dtype=dtype)
        ways = (torch.ops.l2vit.window_attention(qkv, 2, window)[0], plain(qkv, 2, window))
        for kept, out in zip(found, ways, strict=True):
            kept += [out.detach(), *torch.autograd.grad(out, (qkv,), upstream)]
    return found
