"""The formulas of the operations, in plain PyTorch: any device, differentiable any number of times.

Every faster form in this package is tested against these, and compilers and exporters see these.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over all tokens are accumulated in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside, operations keep the precision of their inputs. Nothing to do where it is off
    already, which keeps the meta device and the exporters out of it."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def relu(x: Tensor) -> Tensor:
    """ReLU features in fp32 at least, as a copy that products need not make again."""
    dtype = accurate_dtype(x.dtype)
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format).relu_()


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    clamp: float,
    *,
    qk_first: bool = False,
) -> Tensor:
    """Linear attention with ReLU features: ``s · q (kᵀ v) / max(q · Σ k, clamp)`` (eq. 4).

    kᵀ v and the denominators are accumulated in fp32 whatever the input's precision.

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, n, d).
        scale: s, (heads, 1, 1); None for 1.
        clamp: lower bound of the denominators (Table 10).
        qk_first: multiply (q kᵀ) v instead of q (kᵀ v): the same result.

    Returns:
        (B, heads, N, d) in the precision of ``v``.
    """
    with without_autocast(v):
        q, k, values = relu(q), relu(k), v.to(accurate_dtype(v.dtype))
        denominator = q @ k.sum(2).unsqueeze(3)
        factor = (1.0 if scale is None else scale.to(q.dtype)) / denominator.clamp(min=clamp)
        if qk_first:
            out = (q @ k.transpose(2, 3)) @ values
        else:
            # kᵀ v as (vᵀ k)ᵀ: then the gradient of k is contiguous, which ReLU's backward pass on
            # CPUs needs to be fast.
            out = q @ (values.transpose(2, 3) @ k).transpose(2, 3)
        return (out * factor).to(v.dtype)


def linear_attention_denominators(q: Tensor, k: Tensor) -> Tensor:
    """``relu(q) · Σ relu(k)`` before the clamp, (B, heads, N, 1), in fp32 at least."""
    with without_autocast(q):
        return relu(q) @ relu(k).sum(2).unsqueeze(3)


def linear_attention_weights(q: Tensor, k: Tensor, scale: Tensor | None, clamp: float) -> Tensor:
    """What each query gives each key, (B, heads, N, n); times v it is the attention."""
    denominator = linear_attention_denominators(q, k).clamp(min=clamp)
    factor = (1.0 if scale is None else scale.to(denominator.dtype)) / denominator
    return (relu(q) @ relu(k).transpose(2, 3)) * factor


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Correlate each channel of ``x`` (B, C, H, W) with its kernel, zero padding, same size.

    Args:
        weight: (C, 1, k, k) with k odd.
        bias: (C,) or None.
    """
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


def residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``x`` as it is, and LayerNorm of it over the last dimension."""
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


class AddScaled(torch.autograd.Function):
    """``torch.addcmul(x, branch, factor)``, whose own gradient multiplies the factor by 1 first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return torch.addcmul(x, branch, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, grad * ctx.saved_tensors[0], None


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """``softmax(q kᵀ / √d + bias) v`` for (..., N, d) (eq. 1)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def per_image_conv(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image and channel of ``x`` (B, C, H, W) with its own kernel (B, C, 3, 3)."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    taps = [
        padded[:, :, i : i + height, j : j + width] * kernels[:, :, i, j, None, None]
        for i in range(3)
        for j in range(3)
    ]
    return torch.stack(taps).sum(0)
