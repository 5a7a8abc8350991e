"""What stands between the q, k, v projections and the output projection, as one interface.

A host makes q (B, N, C) and k, v (B, n, C), all heads together, and hands them to a core with the
grid (H, W) of its picture; the core returns (B, N, C) for the output projection. Head g owns
channels g·d ... (g+1)·d − 1. N = prefix + H·W, where a class token may be the prefix. ``source`` is
the tensor (B, n, C) whose mean makes the kernels of the injective core; the others leave it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias
from torch import Tensor, nn

from l2vit.models.depthwise import DepthwiseConv
from l2vit.models.layers import LinearCore, softmax_attention, window_merge, window_partition
from l2vit.models.tracing import exporting

Grid = tuple[int, int]


@dataclass(frozen=True)
class Site:
    """Where a core stands: what it must know to size its parameters.

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


CoreFactory = Callable[[Site], nn.Module]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) to (B, heads, N, C/heads)."""
    b, n, c = x.shape
    return x.view(b, n, heads, c // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) to (B, N, heads·d)."""
    b, heads, n, d = x.shape
    x = x.transpose(1, 2)
    if exporting():
        # Fused attention leaves its result so that this is a view; what ONNX makes of it does not.
        x = x.clone(memory_format=torch.contiguous_format)
    return x.reshape(b, n, heads * d)


def accurate(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, else ``dtype`` itself."""
    return torch.promote_types(dtype, torch.float32)


class SoftmaxCore(nn.Module):
    """Softmax attention of every query over all keys, scale d^-½ (n and N may differ)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.heads = site.heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        return join_heads(softmax_attention(q, k, v))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The softmax of the scaled scores, (B, heads, N, n)."""
        q, k = split_heads(q, self.heads), split_heads(k, self.heads)
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)


class EnhancedCore(LinearCore):
    """L²ViT's enhanced linear attention (see :class:`l2vit.models.layers.LinearCore`)."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.dim, site.heads)

    def features(self, x: Tensor) -> Tensor:
        """(B, N, C) to ReLU features of each head, (B, heads, N, d)."""
        return split_heads(F.relu(x), self.num_heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        values = split_heads(v, self.num_heads)
        return join_heads(self.combine(self.features(q), self.features(k), values))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """What each query gives each key, (B, heads, N, n)."""
        return super().weights(self.features(q), self.features(k))


def shift_mask(grid: Grid, window: int, shift: int) -> Tensor:
    """Added scores of a shifted window attention: (windows, 1, w², w²), −100 between regions.

    The picture rolled by −shift falls apart into bands [0, H−w), [H−w, H−shift), [H−shift, H) of
    rows and of columns; tokens of different regions were not neighbours.
    """
    bands = [(torch.arange(side) >= torch.tensor([[side - window], [side - shift]])).sum(0)
             for side in grid]  # fmt: skip
    region = (3 * bands[0][:, None] + bands[1]).view(1, *grid, 1)
    label = window_partition(region, window, window).squeeze(-1)
    return (label[:, None, :, None] != label[:, None, None, :]) * -100.0


class ShiftedWindowCore(nn.Module):
    """Swin's softmax attention: windows, shift, relative position bias.

    Args:
        site: width, heads and grid; w must divide the grid unless the grid is not larger than w.
        window: w; a grid not larger takes one window, itself, without shift.
        shift: roll of the windows, 0 for none.
    """

    def __init__(self, site: Site, window: int, shift: int) -> None:
        super().__init__()
        small = min(site.grid)
        self.window, self.shift = (small, 0) if small <= window else (window, shift)
        if site.grid[0] % self.window or site.grid[1] % self.window:
            raise ValueError(
                f"a window of {self.window} does not divide the grid {site.grid}: "
                "choose an img_size or window_size that fits"
            )
        self.heads = site.heads
        self.bias = RelPosBias((self.window, self.window), site.heads)
        self.mask: Tensor | None
        mask = shift_mask(site.grid, self.window, self.shift) if self.shift else None
        self.register_buffer("mask", mask, persistent=False)

    def _scores(self, batch: int) -> Tensor:
        bias = self.bias.get_bias()
        if self.mask is None:
            return bias
        scores = bias + self.mask.to(bias.dtype)
        return scores.expand(batch, *scores.shape).flatten(0, 1)

    def _windows(self, x: Tensor, grid: Grid) -> Tensor:
        x = x.unflatten(1, grid)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        return split_heads(window_partition(x, self.window, self.window), self.heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        q, k, v = (self._windows(t, grid) for t in (q, k, v))
        out = join_heads(softmax_attention(q, k, v, self._scores(source.shape[0])))
        out = window_merge(out, self.window, self.window, *grid)
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        return out.flatten(1, 2)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """None: windows have no map over the whole grid."""
        raise NotImplementedError


class StripeCore(nn.Module):
    """CSwin's branch: a core inside windows, plus LePE, a depthwise 3×3 conv of v in each window.

    Args:
        site: width and heads of the branch, grid of the stage.
        window: height and width of its windows; they must divide the grid.
        factory: makes the core that works inside a window.
    """

    def __init__(self, site: Site, window: Grid, factory: CoreFactory) -> None:
        super().__init__()
        if site.grid[0] % window[0] or site.grid[1] % window[1]:
            raise ValueError(
                f"stripes of {window} do not divide the grid {site.grid}: "
                "choose an img_size or window_size that fits"
            )
        self.window = window
        self.core = factory(Site(site.dim, site.heads, window))
        self.get_v = DepthwiseConv(site.dim, 3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        if self.window != grid:
            q, k, v, source = (
                window_partition(t.unflatten(1, grid), *self.window) for t in (q, k, v, source)
            )
        local = self.get_v(v.unflatten(1, self.window)).flatten(1, 2)
        out = self.core(q, k, v, self.window, source) + local
        if self.window == grid:
            return out
        return window_merge(out, *self.window, *grid).flatten(1, 2)


class CrossCore(nn.Module):
    """CSwin's two branches: each half of the channels and heads in stripes of its own direction."""

    def __init__(self, branches: list[StripeCore]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        pieces = zip(*(t.chunk(len(self.branches), dim=2) for t in (q, k, v, source)), strict=True)
        out = [
            branch(q, k, v, grid, source)
            for branch, (q, k, v, source) in zip(self.branches, pieces, strict=True)
        ]
        return torch.cat(out, dim=2)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Those of a single branch over the whole grid, (B, heads, N, N); stripes have none."""
        if len(self.branches) > 1:
            raise NotImplementedError
        only: Any = self.branches[0]
        return only.core.weights(q, k)


def resize_grid(table: Tensor, tokens: int) -> Tensor:
    """A (1, n, C) table over a square grid resized to ``tokens`` rows.

    Bicubic, align_corners False, no antialias. One row more than a square is a class token's: it
    comes first and is left alone.

    Raises:
        ValueError: a row count is neither a square nor one more.
    """
    old, new = _side(table.shape[1]), _side(tokens)
    prefix = table.shape[1] - old * old
    if prefix != tokens - new * new:
        raise ValueError(f"cannot resize a table of {table.shape[1]} rows to {tokens}")
    kept, grid = table[:, :prefix], table[:, prefix:]
    grid = grid.transpose(1, 2).unflatten(2, (old, old)).float()
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([kept, grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def resize_bias(table: Tensor, rows: int) -> Tensor:
    """A relative position table ((2w−1)², heads) resized bicubically to ``rows`` rows."""
    return resize_grid(table[None], rows)[0]


def _side(rows: int) -> int:
    side = math.isqrt(rows)
    if rows - side * side > 1:
        raise ValueError(f"a table of {rows} rows is no square grid")
    return side
