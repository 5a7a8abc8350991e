"""CSwin with the attention as an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from l2vit.models.families.attention import AttentionFactory, AttentionSpec, SoftmaxAttention
from l2vit.models.families.base import (
    ConvEmbed,
    FamilyArguments,
    FamilyBackbone,
    FusedProjected,
)
from l2vit.models.families.window import CrossAttention, StripeAttention


@dataclass(frozen=True)
class CSwinArguments(FamilyArguments):
    """As :class:`FamilyArguments`; ``window_size`` is the stripes' width in stages 3 and 4.

    Stages 1 and 2 have stripes of width 1 and 2; a stage not larger than its width, and the last,
    have one window over the whole grid.
    """

    embed_dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 4, 18, 1)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)

    def stripe(self, stage: int) -> int:
        """Width of the stripes of a stage, 0 for one window over the whole grid."""
        width = min(stage + 1, 2) if stage < 2 else self.window_size
        last = stage == len(self.depths) - 1
        return 0 if last or min(self.grid(stage)) <= width else width


class CSwin(FamilyBackbone):
    """Image to logits. Softmax blocks work in crossed stripes, the others over the whole grid.

    Arguments are the fields of :class:`CSwinArguments`. Takes only the input size it was built for;
    the stripes must divide the grids.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(CSwinArguments(**arguments))

    @staticmethod
    def embed(arguments: CSwinArguments, stage: int) -> nn.Module:
        dims = arguments.embed_dims
        return ConvEmbed(
            dims[stage - 1] if stage else arguments.in_chans,
            dims[stage],
            arguments.grid(stage),
            kernel=3 if stage else 7,
            stride=2 if stage else 4,
            padding=1 if stage else 2,
            image=stage == 0,
        )

    @staticmethod
    def attend(
        arguments: CSwinArguments, stage: int, index: int, factory: AttentionFactory | None
    ) -> nn.Module:
        dim, heads = arguments.embed_dims[stage], arguments.num_heads[stage]
        grid, stripe = arguments.grid(stage), arguments.stripe(stage)
        if factory or not stripe:
            whole = AttentionSpec(dim, heads, grid)
            core = CrossAttention([StripeAttention(whole, grid, factory or SoftmaxAttention)])
        else:
            half = AttentionSpec(dim // 2, heads // 2, grid)
            windows = ((grid[0], stripe), (stripe, grid[1]))
            core = CrossAttention(
                [StripeAttention(half, window, SoftmaxAttention) for window in windows]
            )
        # InLine's CSwin makes its kernels from the block's input before the norm.
        return FusedProjected(dim, core, raw_source=True)
