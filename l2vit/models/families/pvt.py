"""PVT and PVTv2 with the attention as an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from l2vit.models.families.attention import AttentionFactory, AttentionSpec, Grid, SoftmaxAttention
from l2vit.models.families.base import ConvEmbed, FamilyArguments, FamilyBackbone, Projected
from l2vit.models.families.focused import FocusedAttention
from l2vit.models.layers import to_nchw, to_nhwc


@dataclass(frozen=True)
class PvtArguments(FamilyArguments):
    """As :class:`FamilyArguments`; ratios by which keys and values are reduced along each side.

    Attributes:
        sr_ratios: in the softmax blocks of each stage.
        linear_sr_ratios: in the other blocks; every released model has 1.
    """

    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    linear_sr_ratios: tuple[int, ...] = (1, 1, 1, 1)


class ReducedProjected(Projected):
    """Queries from every token, keys and values from the picture made r times smaller."""

    def __init__(self, dim: int, core: nn.Module, ratio: int) -> None:
        super().__init__(dim, core)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.reduce: nn.Module | None = None
        if ratio > 1:
            self.reduce = nn.Conv2d(dim, dim, ratio, stride=ratio)
            self.norm = nn.LayerNorm(dim)

    def project(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        keys = tokens
        if self.reduce is not None:
            picture = self.reduce(to_nchw(tokens.unflatten(1, grid)))
            keys = self.norm(to_nhwc(picture).flatten(1, 2))
        k, v = self.kv(keys).chunk(2, dim=-1)
        return self.q(tokens), k, v


class Pvt(FamilyBackbone):
    """Image to logits; position tables, no class token, mean of the last stage without a norm.

    Arguments are the fields of :class:`PvtArguments`. Any input size works, as the position
    tables are resized on the way, unless an attention has a table of its own (focused).
    """

    block_eps = 1e-6
    final_norm = False
    positions = True
    overlap = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(PvtArguments(**arguments))

    @classmethod
    def embed(cls, arguments: PvtArguments, stage: int) -> nn.Module:
        stride = 2 if stage else 4
        kernel = 2 * stride - 1 if cls.overlap else stride
        return ConvEmbed(
            arguments.embed_dims[stage - 1] if stage else arguments.in_chans,
            arguments.embed_dims[stage],
            arguments.grid(stage),
            kernel=kernel,
            stride=stride,
            padding=kernel // 2 if cls.overlap else 0,
            positions=cls.positions,
            image=stage == 0,
        )

    @classmethod
    def attend(
        cls, arguments: PvtArguments, stage: int, index: int, factory: AttentionFactory | None
    ) -> nn.Module:
        ratios = arguments.linear_sr_ratios if factory else arguments.sr_ratios
        ratio, (height, width) = ratios[stage], arguments.grid(stage)
        dim = arguments.embed_dims[stage]
        spec = AttentionSpec(
            dim,
            arguments.num_heads[stage],
            (height, width),
            keys=(height // ratio) * (width // ratio),
        )
        return ReducedProjected(dim, (factory or SoftmaxAttention)(spec), ratio)

    def fixed_size(self) -> bool:
        return any(isinstance(module, FocusedAttention) for module in self.modules())


class PvtV2(Pvt):
    """PVT with overlapping patches, a convolution in the MLP and norms instead of positions."""

    mlp_kind = "pvt2"
    stage_norms = True
    positions = False
    overlap = True

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        FamilyBackbone.init_weights(module)
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            std = (2.0 / (kernel * module.out_channels / module.groups)) ** 0.5
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
