"""Swin with the attention as an argument."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import PatchMerging
from torch import nn

from l2vit.models.families.attention import AttentionFactory, AttentionSpec
from l2vit.models.families.base import (
    ConvEmbed,
    FamilyArguments,
    FamilyBackbone,
    FusedProjected,
)
from l2vit.models.families.window import ShiftedWindowAttention


class Swin(FamilyBackbone):
    """Image to logits. Softmax blocks work in shifted windows, the others over the whole grid.

    Arguments are the fields of :class:`FamilyArguments`. Takes only the input size it was built
    for; the window must divide every grid larger than itself.
    """

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
        core = factory(spec) if factory else ShiftedWindowAttention(spec, window, shift)
        return FusedProjected(dim, core)
