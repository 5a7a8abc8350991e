"""Injective linear attention (InLine, NeurIPS 2024)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from l2vit.models.families.attention import AttentionSpec, Grid
from l2vit.models.ops import join_heads, per_image_conv, split_heads


class InjectiveAttention(nn.Module):
    """Scores minus their mean plus 1/n instead of divided by their sum, and a dynamic 3×3 residual.

    Per head with s = d^-½: ``O_i = (s/n) q_i Σ_j k_j v_jᵀ + (1 − s q_i·k̄) v̄``: no kernel function,
    no division, every row of weights sums to 1. Beside it each image's v is convolved with kernels
    made from the mean of that image's ``source``; prefix tokens get none.

    Args:
        spec: dimensions; keys and queries must be the same tokens.

    Raises:
        ValueError: the backbone reduces keys and values (v must have a row for every query).
    """

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        if spec.key_tokens != spec.prefix + spec.grid[0] * spec.grid[1]:
            raise ValueError("injective attention needs every key token: set its sr_ratio to 1")
        self.heads = spec.heads
        self.residual = nn.Sequential(
            nn.Conv1d(spec.dim, spec.dim, 1, groups=spec.heads),
            nn.GELU(),
            nn.Conv1d(spec.dim, 9 * spec.dim, 1, groups=spec.heads),
        )

    def local(self, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        """v (B, H·W, C) convolved, each image and channel with its own kernel."""
        b, _, c = v.shape
        kernels = self.residual(source.mean(1).unsqueeze(2)).to(v.dtype)
        picture = v.transpose(1, 2).unflatten(2, grid)
        return per_image_conv(picture, kernels.view(b, c, 3, 3)).flatten(2).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        prefix = q.shape[1] - grid[0] * grid[1]
        local = self.local(v[:, prefix:], grid, source)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        n, d = k.shape[2:]
        # √(s/n) to each side: the plain sum over the tokens overflows fp16.
        factor = (d**-0.5 / n) ** 0.5
        mean = k.mean(2, keepdim=True).transpose(2, 3) * d**-0.5
        product = (k * factor).transpose(2, 3) @ (v * factor)
        out = q @ product + (1 - q @ mean) * v.mean(2, keepdim=True)
        return join_heads(out) + F.pad(local, (0, 0, prefix, 0))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """What each query gives each key, (B, heads, N, n): of any sign, summing to 1."""
        q, k = split_heads(q, self.heads), split_heads(k, self.heads)
        n, d = k.shape[2:]
        scores = q @ k.transpose(2, 3) * (d**-0.5 / n)
        return scores - scores.mean(-1, keepdim=True) + 1 / n
