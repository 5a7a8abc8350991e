"""Swin with the attention as an argument."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from l2vit.models.families.attention import AttentionFactory, AttentionSpec, Grid
from l2vit.models.families.base import (
    ConvEmbed,
    FamilyArguments,
    FamilyBackbone,
    FusedProjected,
)
from l2vit.models.families.window import ShiftedWindowAttention
from l2vit.models.layers import crop, shortfall
from l2vit.models.ops.windows import merge, partition


class Swin(FamilyBackbone):
    """Image to logits. Softmax blocks work in shifted windows, the others over the whole grid.

    Arguments are the fields of :class:`FamilyArguments`. Takes only the input size it was built
    for; the window must divide every grid larger than itself. With ``dynamic`` it takes any size,
    as a backbone of detectors does: every block works in windows of the size it was trained with
    (what was the whole grid is a window, too), and each map is padded with zeros to whole windows.
    No table changes its size.
    """

    may_be_dynamic = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(FamilyArguments(**arguments))

    @staticmethod
    def embed(arguments: FamilyArguments, stage: int) -> nn.Module:
        dims = arguments.embed_dims
        if stage:
            return PatchMerging(dims[stage - 1], dims[stage])
        grid = arguments.grid(0)
        return ConvEmbed(arguments.in_chans, dims[0], grid, kernel=4, stride=4, image=True)

    @staticmethod
    def attend(
        arguments: FamilyArguments, stage: int, index: int, factory: AttentionFactory | None
    ) -> nn.Module:
        dim, window = arguments.embed_dims[stage], arguments.window_size
        spec = AttentionSpec(dim, arguments.num_heads[stage], arguments.grid(stage))
        shift = window // 2 if index % 2 else 0
        dynamic = arguments.dynamic
        core = (
            factory(spec)
            if factory
            else ShiftedWindowAttention(spec, window, shift, dynamic=dynamic)
        )
        if not dynamic:
            return FusedProjected(dim, core)
        return WindowedProjected(dim, core, spec.grid if factory else None)

    def fixed_size(self) -> bool:
        """Whether the model takes only images of the size it was built for."""
        return not self.arguments["dynamic"]

    def forward_stem(self, x: Tensor) -> Tensor:
        if self.arguments["dynamic"]:
            x = F.pad(x, (0, shortfall(x.shape[3], 4), 0, shortfall(x.shape[2], 4)))
        return super().forward_stem(x)


class WindowedProjected(FusedProjected):
    """Attention in zero-padded windows of a map of any size.

    Args:
        dim: C.
        core: a :class:`ShiftedWindowAttention`, or one that attends over a whole grid.
        window: height and width of that grid; None for the first kind, which cuts windows itself.
    """

    def __init__(self, dim: int, core: nn.Module, window: Grid | None) -> None:
        super().__init__(dim, core)
        self.window = window

    def forward(self, x: Tensor, raw: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        size: Grid = self.window or (self.core.window, self.core.window)
        x = F.pad(x, (0, 0, 0, shortfall(width, size[1]), 0, shortfall(height, size[0])))
        padded = (x.shape[1], x.shape[2])
        if self.window is None:
            tokens = x.flatten(1, 2)
            return crop(self.attend(tokens, tokens, padded).view(x.shape), height, width)
        windows = partition(x, *size)
        return crop(merge(self.attend(windows, windows, size), *size, *padded), height, width)
