"""Focused linear attention (FLatten, ICCV 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2vit.models.families.attention import AttentionSpec, Grid
from l2vit.models.layers import Observer, to_nchw, to_nhwc
from l2vit.models.ops import depthwise_conv, join_heads, split_heads
from l2vit.models.ops.reference import accurate_dtype, without_autocast

EPS = 1e-6


def focus(t: Tensor, power: int = 3) -> Tensor:
    """``t^p · ‖t‖ / ‖t^p‖`` over the last dimension, for t > 0: sharper, and as long as before.

    Works on the unit vector, because tiny entries to the third power underflow in fp32.
    """
    length = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
    sharp = (t / length) ** power
    return sharp * (length / torch.linalg.vector_norm(sharp, dim=-1, keepdim=True))


class HeadwiseConv(nn.Conv2d):
    """Depthwise convolution of (B, heads·width, H, W) with kernels (width, 1, k, k) that all heads
    share; same padding, with bias."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__(width, width, kernel_size, padding=kernel_size // 2, groups=width)

    def forward(self, input: Tensor) -> Tensor:
        # Repeating the kernels spares a copy of the input with the heads moved to the batch.
        heads = input.shape[1] // self.in_channels
        assert self.bias is not None
        return depthwise_conv(input, self.weight.repeat(heads, 1, 1, 1), self.bias.repeat(heads))


class FocusedAttention(nn.Module):
    """Focused features of q and k, kᵀv first, and a 5×5 depthwise conv of v beside it.

    ``A_i = q_i (1/n) Σ_j k_j v_jᵀ / (q_i · k̄ + 1e-6)`` with q, k after :func:`focus` over all
    channels; the output is A + dwc(v). Features and denominators are computed in fp32 at least.

    Args:
        spec: dimensions; ``spec.key_tokens`` rows of positional encoding. Where n < H·W, v is
            stretched along the flattened tokens for the convolution.
        power: p of the focusing function.
        kernel_size: of the convolution, whose kernels all heads share.
    """

    def __init__(self, spec: AttentionSpec, power: int = 3, kernel_size: int = 5) -> None:
        super().__init__()
        self.heads, self.power = spec.heads, power
        width = spec.dim // spec.heads
        self.scale = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.positional_encoding = nn.Parameter(torch.zeros(1, spec.key_tokens, spec.dim))
        self.dwc = HeadwiseConv(width, kernel_size)
        self.observer: Observer | None = None
        """Is shown the denominators q · k̄."""

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Focused q (B, heads, N, d) and k (B, heads, n, d), fp32 or finer."""
        dtype = accurate_dtype(q.dtype)
        scale = F.softplus(self.scale.to(dtype))
        k = k.to(dtype) + self.positional_encoding.to(dtype)
        q, k = ((F.relu(t.to(dtype)) + EPS) / scale for t in (q, k))
        return (
            split_heads(focus(q, self.power), self.heads),
            split_heads(focus(k, self.power), self.heads),
        )

    def _denominator(self, q: Tensor, mean: Tensor) -> Tensor:
        denominator = q @ mean.transpose(2, 3)
        if self.observer is not None:
            self.observer(denominator.detach())
        return denominator + EPS

    def local(self, v: Tensor, grid: Grid) -> Tensor:
        """The convolution of v, (B, n, C) to (B, H·W, C); every head has the same kernels."""
        places = grid[0] * grid[1]
        if v.shape[1] != places:
            v = F.interpolate(v.transpose(1, 2), places, mode="linear").transpose(1, 2)
        return to_nhwc(self.dwc(to_nchw(v.unflatten(1, grid)))).flatten(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        prefix = q.shape[1] - grid[0] * grid[1]
        local = self.local(v[:, prefix:], grid)
        with without_autocast(q):
            q, k = self.features(q, k)
            mean = k.mean(2, keepdim=True)
            # The channels of k̄ go from the keys to the queries, in which they sum to at most 1.
            # Focusing leaves weak channels and heads so small that fp16 could not hold q over its
            # denominator, nor k. It changes no product, so no gradient need pass through it.
            level = mean.detach().clamp(min=torch.finfo(mean.dtype).tiny)
            q = q / self._denominator(q, mean) * level
            # n^-½ to each side: the plain sum over the tokens overflows fp16.
            factor = k.shape[2] ** -0.5
            k = k * (factor / level)
        values = split_heads(v, self.heads)
        keys = k.to(v.dtype).transpose(2, 3)
        out = join_heads(q.to(v.dtype) @ (keys @ (values * factor)))
        return out + F.pad(local, (0, 0, prefix, 0))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """What each query gives each key, (B, heads, N, n): all positive, summing to nearly 1."""
        q, k = self.features(q, k)
        denominator = self._denominator(q, k.mean(2, keepdim=True))
        return q @ k.transpose(2, 3) / (k.shape[2] * denominator)
