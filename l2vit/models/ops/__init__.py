"""The operations of the networks, each by the fastest form there is for the device at hand.

This file alone chooses: by rules, or as a run has measured (``choice.py``). ``reference.py`` holds
the formulas; ``cpu.py`` and ``triton_*.py`` hold faster forms of the same. The operations are plain
functions of tensors: what a module owns and how it is called stays PyTorch's own, so that hooks,
profilers and quantisers find what they expect.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from l2vit.models.ops import choice, cpu, gpu, reference, windows
from l2vit.models.ops.gpu import use_triton
from l2vit.models.ops.modes import compiling, exporting, has_open_sizes, statically_true

__all__ = [
    "FORMS",
    "Order",
    "add_scaled",
    "depthwise_conv",
    "fuses_local_concentration",
    "fuses_residual_conv",
    "fuses_residual_norm",
    "join_heads",
    "linear_attention",
    "linear_attention_denominators",
    "local_concentration",
    "per_image_conv",
    "residual_depthwise_conv",
    "residual_layer_norm",
    "softmax_attention",
    "split_heads",
    "split_qkv",
    "use_triton",
    "window_attention",
]

Order = Literal["auto", "kv", "qk"]
_TRITON_HEAD_WIDTHS = (16, 32)
_TRITON_KERNEL_SIZES = (3, 5, 7)
_TRITON_NORM_WIDTH = 4096
LARGEST_GRID = 32768
"""Sequences that PyTorch's fused attention gets at once: with 65,536 CUDA refuses its grid."""


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) to (B, heads, N, C/heads); head g owns channels g·d ... (g+1)·d − 1."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) to (B, N, heads·d)."""
    return x.transpose(1, 2).flatten(2)


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (B, heads, N, d), of the fused projection (B, N, 3·heads·d)."""
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _triton_runs(kernel: str, x: Tensor, head_width: int) -> bool:
    """Whether a kernel takes ``x``. False in torch.jit.trace, which must not see sizes compared."""
    return gpu.may_run(kernel, x) and head_width in _TRITON_HEAD_WIDTHS


def linear_attention(
    qkv: Tensor, scale: Tensor | None, num_heads: int, clamp: float, order: Order = "auto"
) -> Tensor:
    """Linear attention with ReLU features: ``s · q (kᵀ v) / max(q · Σ k, clamp)`` (eq. 4).

    Args:
        qkv: (B, ..., 3·C), tokens in any number of dimensions; q, k, v in this order.
        scale: s, (heads, 1, 1); None for 1.
        clamp: lower bound of the denominators (Table 10).
        order: kv multiplies q (kᵀ v), qk (q kᵀ) v; auto takes qk where the tokens are fewer than
            the channels of a head (Sec. 11). The result is the same.

    Returns:
        (B, ..., C)
    """
    tokens = qkv.flatten(1, -2)
    head_width = tokens.shape[2] // (3 * num_heads)
    qk_first = order == "qk"
    if order == "auto":
        qk_first = statically_true(tokens.shape[1] < head_width)
    if qk_first:
        out = _linear_by_formula(tokens, scale, num_heads, clamp, qk_first=True)
    else:
        fast = "triton" if _triton_runs("linear_attention", tokens, head_width) else None
        options = (num_heads, int(scale is not None))
        compute = _form("linear_attention", tokens, options, fast)
        out = compute(tokens, scale, num_heads, clamp)
    return out.view(*qkv.shape[:-1], qkv.shape[-1] // 3)


def linear_attention_denominators(qkv: Tensor, num_heads: int) -> Tensor:
    """``q · Σ k`` before the clamp, (B, heads, N, 1) in fp32 at least: a vital sign, to be watched.

    Args:
        qkv: as for :func:`linear_attention`.
    """
    q, k, _ = split_qkv(qkv.detach().flatten(1, -2), num_heads)
    return reference.linear_attention_denominators(q, k)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Correlate each channel of ``x`` (B, C, H, W) with its kernel, zero padding, same size.

    Fastest for ``x`` in channels-last memory, in which the result is.

    Args:
        weight: (C, 1, k, k) with k odd.
        bias: (C,) or None.
    """
    return _depthwise_form(x, weight, bias)(x, weight, bias)


def residual_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x + depthwise_conv(x, weight, bias)``, in one pass where the Triton kernel runs."""
    compute = _depthwise_form(x, weight, bias)
    mixed = torch.is_autocast_enabled(x.device.type)  # then x is finer than what is convolved
    if compute is FORMS["depthwise_conv"]["triton"] and not mixed:
        return _depthwise_by_triton(x, weight, bias, residual=True)
    return x + compute(x, weight, bias)


def fuses_residual_conv(x: Tensor) -> bool:
    """Whether :func:`residual_depthwise_conv` may be faster than its two steps by themselves."""
    return gpu.may_run("depthwise", x)


def fuses_local_concentration(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`local_concentration` runs instead of its steps, by the rules or the table.

    Args:
        x: (B, H, W, C).
        weight: of the first convolution, (C, 1, k, k).
    """
    size = weight.shape[3]
    runs = (
        gpu.may_run("local_concentration", x)
        and not compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and size in _TRITON_KERNEL_SIZES
        and x.dtype == weight.dtype
        and x.shape[0] * x.shape[1] * x.shape[2] > 1
    )
    return runs and choice.settled("local_concentration", x, (size,)) in (None, "triton")


def local_concentration(
    x: Tensor,
    conv1: tuple[Tensor, Tensor | None],
    norm: tuple[Tensor, Tensor],
    conv2: tuple[Tensor, Tensor | None],
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
) -> Tensor:
    """Depthwise conv, GELU, BatchNorm by the batch's statistics, depthwise conv, by our kernels.

    Args:
        x: (B, H, W, C).
        conv1, norm, conv2: weight and bias of each.
        running: mean and variance in fp32, which are updated; None: this pass does not count.
    """
    from l2vit.models.ops import triton_local_concentration

    return triton_local_concentration.local_concentration(
        x, *conv1, *norm, *running, momentum, eps, *conv2
    )


def _depthwise_form(x: Tensor, weight: Tensor, bias: Tensor | None) -> Compute:
    # torch.jit.trace, in which no kernel may run, must not see sizes compared.
    triton = gpu.may_run("depthwise", x) and weight.shape[3] in _TRITON_KERNEL_SIZES
    fast = "triton" if triton else "columns" if cpu.prefers_columns(x, weight) else None
    return _form("depthwise_conv", x, (weight.shape[3], int(bias is not None)), fast)


def residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``x`` for a residual connection and, normalised over its last dimension, for the branch.

    For the sake of the gradient: where the Triton kernel runs, both parts of it are one pass.
    """
    fast = "triton" if fuses_residual_norm(x) and x.dtype == weight.dtype else None
    return _form("layer_norm", x, (), fast)(x, weight, bias, eps)


def fuses_residual_norm(x: Tensor) -> bool:
    """Whether :func:`residual_layer_norm` may be faster than a LayerNorm by itself.

    Compilers fuse the plain form themselves.
    """
    return (
        gpu.may_run("layer_norm", x)
        and not compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and x.shape[-1] <= _TRITON_NORM_WIDTH
    )


def add_scaled(x: Tensor, branch: Tensor, factor: Tensor) -> Tensor:
    """``x + branch * factor``; the factor, which broadcasts, gets no gradient."""
    if compiling() or torch._C._are_functorch_transforms_active():
        return torch.addcmul(x, branch, factor)
    return reference.AddScaled.apply(x, branch, factor)  # type: ignore[no-any-return]


def _in_one_precision(
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """What autocast would make of a convolution, for a form that it does not know."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return compute(x, weight, bias)


def _depthwise_by_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: bool = False
) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    return torch.ops.l2vit.depthwise(x, weight, bias, residual)[0].permute(0, 3, 1, 2)


def window_attention(qkv: Tensor, num_heads: int, window: int) -> Tensor:
    """Softmax attention (eq. 1) inside the non-overlapping windows of a map.

    Args:
        qkv: (B, H, W, 3·C); the window divides H and W.
        window: height and width of a window.

    Returns:
        (B, H, W, C)
    """
    width = qkv.shape[3]
    fast = "triton" if _triton_runs("window_attention", qkv, width // (3 * num_heads)) else None
    compute = _form("window_attention", qkv, (num_heads, window), fast)
    return compute(qkv, num_heads, window)


def _attend_in_windows(qkv: Tensor, num_heads: int, window: int) -> Tensor:
    """By partitions of the map, whose tokens PyTorch's attention takes."""
    b, h, w, _ = qkv.shape
    by_index = has_open_sizes(h, w)
    if by_index:
        tokens = windows.partition_by_index(qkv, window)
    else:
        tokens = windows.partition(qkv, window, window)
    if by_index or tokens.device.type == "cpu" or statically_true(len(tokens) <= LARGEST_GRID):
        out = join_heads(softmax_attention(*split_qkv(tokens, num_heads)))
    else:
        out = _in_parts(tokens, num_heads)
    if by_index:
        return windows.merge_by_index(out, window, b, h, w)
    return windows.merge(out, window, window, h, w)


def _in_parts(tokens: Tensor, num_heads: int) -> Tensor:
    """Attention of (n, N, 3·C), no more sequences at once than a kernel's grid takes."""
    parts = [split_qkv(part, num_heads) for part in tokens.split(LARGEST_GRID)]
    return torch.cat([join_heads(softmax_attention(*part)) for part in parts])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """``softmax(q kᵀ / √d + bias) v`` for (..., N, d)."""
    bias = None if bias is None else bias.to(q.dtype)
    if cpu.prefers_products(q, k):
        return reference.softmax_attention(q, k, v, bias)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # What the fused kernel leaves can be joined as a view; what ONNX makes of it cannot.
    return out.clone(memory_format=torch.contiguous_format) if exporting() else out


def per_image_conv(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image and channel of ``x`` (B, C, H, W) with its own kernel (B, C, 3, 3)."""
    if exporting():  # ONNX knows no convolution whose groups depend on the batch
        return reference.per_image_conv(x, kernels)
    b, c, h, w = x.shape
    flat = x.reshape(1, b * c, h, w)
    out = F.conv2d(flat, kernels.view(b * c, 1, 3, 3), padding=1, groups=b * c)
    return out.view(b, c, h, w)


def _linear_by_formula(
    tokens: Tensor, scale: Tensor | None, num_heads: int, clamp: float, *, qk_first: bool = False
) -> Tensor:
    heads = split_qkv(tokens, num_heads)
    return join_heads(reference.linear_attention(*heads, scale, clamp, qk_first=qk_first))


def _linear_by_triton(tokens: Tensor, scale: Tensor | None, num_heads: int, clamp: float) -> Tensor:
    return torch.ops.l2vit.linear_attention(tokens, scale, num_heads, clamp)[0]


def _windows_by_triton(qkv: Tensor, num_heads: int, window: int) -> Tensor:
    return torch.ops.l2vit.window_attention(qkv, num_heads, window)[0]


def _norm_by_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from l2vit.models.ops import triton_layer_norm

    return triton_layer_norm.residual_layer_norm(x, weight, bias, eps)


def _concentration_by_steps(
    x: Tensor,
    conv1: tuple[Tensor, Tensor | None],
    norm: tuple[Tensor, Tensor],
    conv2: tuple[Tensor, Tensor | None],
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
) -> Tensor:
    """Each convolution by its own fastest form."""
    x = F.gelu(depthwise_conv(x.permute(0, 3, 1, 2), *conv1))
    weight, bias = (tensor.float() for tensor in norm)
    x = F.batch_norm(x, *running, weight, bias, True, momentum, eps)
    return depthwise_conv(x, *conv2).permute(0, 2, 3, 1)


Compute = Callable[..., Any]
FORMS: dict[str, dict[str, Compute]] = {
    "linear_attention": {"reference": _linear_by_formula, "triton": _linear_by_triton},
    "depthwise_conv": {
        "reference": reference.depthwise_conv,
        "columns": functools.partial(_in_one_precision, cpu.depthwise_conv),
        "triton": functools.partial(_in_one_precision, _depthwise_by_triton),
    },
    "layer_norm": {"reference": reference.residual_layer_norm, "triton": _norm_by_triton},
    "local_concentration": {"reference": _concentration_by_steps, "triton": local_concentration},
    "window_attention": {"reference": _attend_in_windows, "triton": _windows_by_triton},
}
"""Each operation's forms by name; "compiled", the reference through the compiler, besides."""


def _form(op: str, x: Tensor, options: choice.Options, fast: str | None) -> Compute:
    """What the run settled on where it can run here; without a table ``fast``, if there is one.

    Args:
        options: what a form's speed depends on besides the shape and type of ``x``.
        fast: a form other than the reference that can run on ``x``, here and now.
    """
    name = choice.settled(op, x, options) or fast or choice.REFERENCE
    if name == "compiled":
        return compiled_form(op)
    return FORMS[op][name if name == fast else choice.REFERENCE]


@functools.cache
def compiled_form(op: str) -> Compute:
    """The reference through ``torch.compile``, anew for each shape."""
    return torch.compile(FORMS[op][choice.REFERENCE], dynamic=False)
