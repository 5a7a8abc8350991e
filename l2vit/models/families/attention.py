"""What stands between the q, k, v projections and the output projection, as one interface.

A backbone makes q (B, N, C) and k, v (B, n, C), all heads together, and hands them to an attention
with the grid (H, W) of its picture; the attention returns (B, N, C) for the output projection. Head
g owns channels g·d ... (g+1)·d − 1. N = prefix + H·W, where a class token may be the prefix.
``source`` is the tensor (B, n, C) whose mean makes the kernels of injective attention; the others
leave it alone. ``weights(q, k)`` is what each query gives each key, (B, heads, N, n), for pictures;
NotImplementedError where an attention works in windows or weighs channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2vit.models.layers import Observer
from l2vit.models.ops import join_heads, reference, softmax_attention, split_heads

Grid = tuple[int, int]


@dataclass(frozen=True)
class AttentionSpec:
    """What an attention must know of its place to size its parameters.

    Attributes:
        dim: channels C.
        heads: divides ``dim``.
        grid: (H, W) of the queries.
        prefix: tokens before the grid (DeiT's class token).
        keys: key and value tokens n; 0 for as many as queries.
    """

    dim: int
    heads: int
    grid: Grid
    prefix: int = 0
    keys: int = 0

    @property
    def key_tokens(self) -> int:
        """n."""
        return self.keys or self.prefix + self.grid[0] * self.grid[1]


AttentionFactory = Callable[[AttentionSpec], nn.Module]


class SoftmaxAttention(nn.Module):
    """Softmax attention of every query over all keys, scale d^-½ (n and N may differ)."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.heads = spec.heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        return join_heads(softmax_attention(q, k, v))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The softmax of the scaled scores."""
        q, k = split_heads(q, self.heads), split_heads(k, self.heads)
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)


class EnhancedAttention(nn.Module):
    """L²ViT's enhanced linear attention (see :class:`l2vit.models.l2vit.LinearAttention`).

    With ``order`` set to qk it multiplies q kᵀ first: the same result.
    """

    clamp = 100.0
    order = "kv"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.scale = nn.Parameter(torch.full((spec.heads, 1, 1), (spec.dim // spec.heads) ** -0.5))
        self.observer: Observer | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        if self.observer is not None:
            self.observer(reference.linear_attention_denominators(q.detach(), k.detach()))
        qk_first = self.order == "qk"
        return join_heads(
            reference.linear_attention(q, k, v, self.scale, self.clamp, qk_first=qk_first)
        )

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Rows sum to s where the clamp does not act, else to less."""
        q, k = split_heads(q, self.heads), split_heads(k, self.heads)
        return reference.linear_attention_weights(q, k, self.scale, self.clamp)
