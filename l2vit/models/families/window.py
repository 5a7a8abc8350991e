"""Attention inside windows: Swin's shifted windows and CSwin's crossed stripes."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RelPosBias
from torch import Tensor, nn

from l2vit.models.families.attention import AttentionFactory, AttentionSpec, Grid
from l2vit.models.layers import DepthwiseConv, to_nchw, to_nhwc
from l2vit.models.ops import join_heads, softmax_attention, split_heads
from l2vit.models.ops.windows import merge, partition


def shift_mask(grid: Grid, window: int, shift: int) -> Tensor:
    """Added scores of a shifted window attention: (windows, 1, w², w²), −100 between regions.

    The picture rolled by −shift falls apart into bands [0, H−w), [H−w, H−shift), [H−shift, H) of
    rows and of columns; tokens of different regions were not neighbours.
    """
    bands = [(torch.arange(side) >= torch.tensor([[side - window], [side - shift]])).sum(0)
             for side in grid]  # fmt: skip
    region = (3 * bands[0][:, None] + bands[1]).view(1, *grid, 1)
    label = partition(region, window, window).squeeze(-1)
    return (label[:, None, :, None] != label[:, None, None, :]) * -100.0


class ShiftedWindowAttention(nn.Module):
    """Swin's softmax attention: windows, shift, relative position bias.

    Args:
        spec: width, heads and grid; w must divide the grid unless the grid is not larger than w.
        window: w; a grid not larger takes one window, itself, without shift.
        shift: roll of the windows, 0 for none.
        dynamic: take any grid that w divides, and shift wherever it is more than one window.
    """

    def __init__(
        self, spec: AttentionSpec, window: int, shift: int, *, dynamic: bool = False
    ) -> None:
        super().__init__()
        small = min(spec.grid)
        self.window, self.shift = (small, 0) if small <= window else (window, shift)
        self.dynamic = dynamic
        if dynamic:
            self.shift = min(shift, self.window // 2)
        elif spec.grid[0] % self.window or spec.grid[1] % self.window:
            raise ValueError(
                f"a window of {self.window} does not divide the grid {spec.grid}: "
                "choose an img_size or window_size that fits"
            )
        self.heads = spec.heads
        self.bias = RelPosBias((self.window, self.window), spec.heads)
        self.mask: Tensor | None
        fixed = self.shift and not dynamic
        mask = shift_mask(spec.grid, self.window, self.shift) if fixed else None
        self.register_buffer("mask", mask, persistent=False)

    def _scores(self, batch: int, grid: Grid, shift: int) -> Tensor:
        bias = self.bias.get_bias()
        if not shift:
            return bias
        mask = self.mask
        if mask is None:
            mask = shift_mask(grid, self.window, shift).to(bias.device)
        scores = bias + mask.to(bias.dtype)
        return scores.expand(batch, *scores.shape).flatten(0, 1)

    def _windows(self, x: Tensor, grid: Grid, shift: int) -> Tensor:
        x = x.unflatten(1, grid)
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        return split_heads(partition(x, self.window, self.window), self.heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        one = self.dynamic and grid == (self.window, self.window)
        shift = 0 if one else self.shift
        q, k, v = (self._windows(t, grid, shift) for t in (q, k, v))
        out = join_heads(softmax_attention(q, k, v, self._scores(source.shape[0], grid, shift)))
        out = merge(out, self.window, self.window, *grid)
        if shift:
            out = out.roll((shift, shift), (1, 2))
        return out.flatten(1, 2)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """None: windows have no map over the whole grid."""
        raise NotImplementedError


class StripeAttention(nn.Module):
    """CSwin's branch: attention inside windows, plus LePE, a depthwise 3×3 conv of v in each.

    Args:
        spec: width and heads of the branch, grid of the stage.
        window: height and width of its windows; they must divide the grid.
        factory: makes the attention that works inside a window.
    """

    def __init__(self, spec: AttentionSpec, window: Grid, factory: AttentionFactory) -> None:
        super().__init__()
        if spec.grid[0] % window[0] or spec.grid[1] % window[1]:
            raise ValueError(
                f"stripes of {window} do not divide the grid {spec.grid}: "
                "choose an img_size or window_size that fits"
            )
        self.window = window
        self.core = factory(AttentionSpec(spec.dim, spec.heads, window))
        self.get_v = DepthwiseConv(spec.dim, 3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        if self.window != grid:
            q, k, v, source = (
                partition(t.unflatten(1, grid), *self.window) for t in (q, k, v, source)
            )
        local = to_nhwc(self.get_v(to_nchw(v.unflatten(1, self.window)))).flatten(1, 2)
        out = self.core(q, k, v, self.window, source) + local
        if self.window == grid:
            return out
        return merge(out, *self.window, *grid).flatten(1, 2)


class CrossAttention(nn.Module):
    """CSwin's two branches: each half of the channels and heads in stripes of its own direction."""

    def __init__(self, branches: list[StripeAttention]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, source: Tensor) -> Tensor:
        parts = zip(*(t.chunk(len(self.branches), dim=2) for t in (q, k, v, source)), strict=True)
        out = [
            branch(q, k, v, grid, source)
            for branch, (q, k, v, source) in zip(self.branches, parts, strict=True)
        ]
        return torch.cat(out, dim=2)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Those of a single branch over the whole grid, (B, heads, N, N); stripes have none."""
        if len(self.branches) > 1:
            raise NotImplementedError
        only: Any = self.branches[0]
        return only.core.weights(q, k)
