"""Injective linear attention (InLine, NeurIPS 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2vit.models.cores import Grid, Site, join_heads, split_heads


def _nine_shifts(x: Tensor, kernels: Tensor) -> Tensor:
    """x (B, H, W, C) convolved, each image and channel with its own 3×3 kernel (B, C, 9)."""
    height, width = x.shape[1], x.shape[2]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    weights = kernels[:, None, None].unbind(-1)
    return torch.stack([a * w for a, w in zip(shifts, weights, strict=True)]).sum(0)


class InjectiveCore(nn.Module):
    """Scores minus their mean plus 1/n instead of divided by their sum, and a dynamic 3×3 residual.

    Per head with s = d^-½: ``O_i = (s/n) q_i Σ_j k_j v_jᵀ + (1 − s q_i·k̄) v̄``: no kernel function,
    no division, every row of weights sums to 1. Beside it each image's v is convolved with kernels
    made from the mean of that image's ``source``; prefix tokens get none.

    Args:
        site: dimensions; keys and queries must be the same tokens.

    Raises:
        ValueError: the host reduces keys and values (v must have a row for every query).
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        if site.key_tokens != site.prefix + site.grid[0] * site.grid[1]:
            raise ValueError("injective attention needs every key token: set its sr_ratio to 1")
        self.heads = site.heads
        self.residual = nn.Sequential(
            nn.Conv1d(site.dim, site.dim, 1, groups=site.heads),
            nn.GELU(),
            nn.Conv1d(site.dim, 9 * site.dim, 1, groups=site.heads),
        )

    def local(self, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        """v (B, H·W, C) convolved, each image and channel with its own kernel."""
        b, n, c = v.shape
        kernels = self.residual(source.mean(1).unsqueeze(2)).to(v.dtype)
        if torch.compiler.is_exporting():
            # ONNX knows no convolution whose groups depend on the batch.
            return _nine_shifts(v.unflatten(1, grid), kernels.view(b, c, 9)).flatten(1, 2)
        picture = v.transpose(1, 2).reshape(1, b * c, *grid)
        out = F.conv2d(picture, kernels.view(b * c, 1, 3, 3), padding=1, groups=b * c)
        return out.view(b, c, n).transpose(1, 2)

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
