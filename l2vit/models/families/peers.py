"""The attentions that Tables 1 and 8 of the paper compare in DeiT-Tiny.

Each takes q (B, N, C), k and v (B, n, C) straight from the projections (see attention.py). Those
that are linear in N multiply kᵀ v first; ``order="qk"`` multiplies q kᵀ first, with the same result
and the multiply-adds that Table 8 counts.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2vit.models.families.attention import AttentionSpec, Grid
from l2vit.models.ops import join_heads, split_heads
from l2vit.models.ops.reference import accurate_dtype

Order = Literal["kv", "qk"]
_EPS = 1e-6


class PeerAttention(nn.Module):
    """``φ(q) (φ(k)ᵀ v)``, divided by ``φ(q) · Σ φ(k)`` where :attr:`normalised`, per head."""

    normalised = True

    def __init__(self, spec: AttentionSpec, order: Order = "kv") -> None:
        super().__init__()
        self.heads = spec.heads
        self.order = order

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k) of q, k (B, heads, N, d), at least fp32."""
        raise NotImplementedError

    def mapped(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features of q, k (B, N, C), per head."""
        q, k = (split_heads(t, self.heads) for t in (q, k))
        dtype = accurate_dtype(q.dtype)
        return self.features(q.to(dtype), k.to(dtype))

    def divisor(self, q: Tensor, k: Tensor) -> Tensor | float:
        """Sum of the scores of each query, (B, heads, N, 1), kept away from zero."""
        if not self.normalised:
            return 1.0
        total = (q * k.sum(2, keepdim=True)).sum(3, keepdim=True)
        return torch.where(total < 0, total.clamp(max=-_EPS), total.clamp(min=_EPS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        dtype = v.dtype
        q, k = self.mapped(q, k)
        values = split_heads(v, self.heads).to(q.dtype)
        if self.order == "kv":
            out = q @ (k.transpose(2, 3) @ values)
        else:
            out = (q @ k.transpose(2, 3)) @ values
        return join_heads((out / self.divisor(q, k)).to(dtype))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """What each query gives each key, (B, heads, N, n)."""
        q, k = self.mapped(q, k)
        return (q @ k.transpose(2, 3)) / self.divisor(q, k)


class ReluAttention(PeerAttention):
    """Linear attention, φ = ReLU (Table 1, "LA. ReLU"): without clamp, scale and LCM."""

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(q), F.relu(k)


class LeakyReluAttention(PeerAttention):
    """Linear attention, φ = LeakyReLU: scores, and their sum, may be negative (Table 1)."""

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.leaky_relu(q), F.leaky_relu(k)


class SimaAttention(PeerAttention):
    """SimA, Table 1's "L1 norm": each channel of q and of k divided by its ℓ1 norm over tokens."""

    normalised = False

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(q, p=1, dim=2, eps=_EPS), F.normalize(k, p=1, dim=2, eps=_EPS)


class EfficientAttention(PeerAttention):
    """EfficientAttention: softmax of q over channels and of k over tokens; rows then sum to 1."""

    normalised = False

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q.softmax(3), k.softmax(2)


class CosAttention(PeerAttention):
    """cosFormer: ReLU features whose scores are weighed by cos(π (i − j) / 2n) of the positions.

    cos(a − b) = cos a cos b + sin a sin b makes two linear attentions of it, side by side.
    """

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        length = max(q.shape[2], k.shape[2])
        return self.turned(q, length), self.turned(k, length)

    @staticmethod
    def turned(x: Tensor, length: int) -> Tensor:
        """(B, heads, N, d) to (B, heads, N, 2d): times cosine, times sine of its position."""
        position = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None]
        angle = position * (math.pi / (2 * length))
        x = F.relu(x)
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=3)


class XcaAttention(nn.Module):
    """XCA: softmax attention between the d channels of a head, learned temperature per head."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.temperature = nn.Parameter(torch.ones(spec.heads, 1, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        q, k = F.normalize(q, dim=2), F.normalize(k, dim=2)
        mixing = (k.transpose(2, 3) @ q * self.temperature).softmax(2)
        return join_heads(v @ mixing)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """None: it weighs channels, not tokens."""
        raise NotImplementedError
