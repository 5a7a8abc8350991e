"""What the backbones PVT, Swin and CSwin have in common; the attention is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from l2vit.models.backbone import Backbone, Stage
from l2vit.models.families.attention import (
    AttentionFactory,
    EnhancedAttention,
    Grid,
    SoftmaxAttention,
)
from l2vit.models.families.focused import FocusedAttention
from l2vit.models.families.injective import InjectiveAttention
from l2vit.models.families.peers import (
    CosAttention,
    EfficientAttention,
    LeakyReluAttention,
    ReluAttention,
    SimaAttention,
    XcaAttention,
)
from l2vit.models.families.resize import Resizable
from l2vit.models.layers import Mlp, MlpKind, to_nchw, to_nhwc

ATTENTIONS: dict[str, AttentionFactory] = {
    "softmax": SoftmaxAttention,
    "enhanced": EnhancedAttention,
    "focused": FocusedAttention,
    "injective": InjectiveAttention,
    "linear": ReluAttention,
    "leaky": LeakyReluAttention,
    "sima": SimaAttention,
    "efficient": EfficientAttention,
    "cosformer": CosAttention,
    "xca": XcaAttention,
}
"""The attentions any backbone may hold, by name."""


def attention_factory(attention: str | AttentionFactory) -> AttentionFactory:
    """The maker of an attention; a factory is its own.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if not isinstance(attention, str):
        return attention
    if attention not in ATTENTIONS:
        raise ValueError(f"unknown attention {attention!r}; known: {', '.join(ATTENTIONS)}")
    return ATTENTIONS[attention]


def linear_blocks(types: str, depths: tuple[int, ...]) -> list[list[bool]]:
    """Which blocks of each stage are linear, from a string of one letter per stage.

    L or I: all of them; S: none (softmax); M: the first m, the number behind the letters ("IIMS2").

    Raises:
        ValueError: another letter, or a number of letters other than the stages.
    """
    letters, number = types[: len(depths)], types[len(depths) :]
    bad = len(letters) != len(depths) or set(letters) - set("LISM")
    if bad or (number and not number.isdigit()) or ("M" in letters) != bool(number):
        raise ValueError(f"types {types!r}: one of L, I, S, M per stage, and a number if M occurs")
    first = {"L": max(depths), "I": max(depths), "S": 0, "M": int(number or 0)}
    return [
        [index < first[letter] for index in range(depth)]
        for letter, depth in zip(letters, depths, strict=True)
    ]


@dataclass(frozen=True)
class FamilyArguments:
    """Constructor arguments every backbone of the families takes.

    Attributes:
        img_size: the size the tables of the model are built for.
        embed_dims: channels per stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        mlp_ratios: hidden channels of the MLP over ``embed_dims``.
        types: which blocks hold ``attention``: see :func:`linear_blocks`.
        attention: softmax, enhanced (L²ViT's), focused (FLatten's), injective (InLine's), or any
            factory from an :class:`AttentionSpec`; the other blocks have the backbone's own
            softmax attention.
        window_size: of the softmax blocks where the backbone has windows; PVT has none and takes
            it for the sake of one interface.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; grows linearly from 0 over all blocks.
        dynamic: take images of any size, in windows as trained (Swin alone).
    """

    img_size: int | tuple[int, int] = 224
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "avg"
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)
    types: str = "SSSS"
    attention: str | AttentionFactory = "softmax"
    window_size: int = 7
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    dynamic: bool = False

    def grid(self, stage: int) -> Grid:
        """(H, W) of a stage: a quarter of the image, halved from stage to stage."""
        height, width = to_2tuple(self.img_size)
        return height // (4 << stage), width // (4 << stage)


class Projected(nn.Module):
    """An attention between its projections, on (B, H, W, C).

    Args:
        dim: C.
        core: see :mod:`l2vit.models.families.attention`.
        raw_source: the core's ``source`` is the block's input before its norm (CSwin).
    """

    def __init__(self, dim: int, core: nn.Module, *, raw_source: bool = False) -> None:
        super().__init__()
        self.raw_source = raw_source
        self.core: Any = core
        self.proj = nn.Linear(dim, dim)

    def project(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, N, C), k and v (B, n, C) of normalised tokens (B, N, C)."""
        raise NotImplementedError

    def attend(self, tokens: Tensor, source: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) to the same; N is H·W, or more where there are prefix tokens."""
        return self.proj(self.core(*self.project(tokens, grid), grid, source))

    def forward(self, x: Tensor, raw: Tensor) -> Tensor:
        source = raw if self.raw_source else x
        grid = (x.shape[1], x.shape[2])
        return self.attend(x.flatten(1, 2), source.flatten(1, 2), grid).view(x.shape)

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Tensor:
        """The weights of each query over all keys, (B, heads, N, n), for pictures.

        ``x`` is what the module gets, (B, H, W, C).

        Raises:
            NotImplementedError: the core works in windows, or weighs channels.
        """
        q, k, _ = self.project(x.flatten(1, 2), (x.shape[1], x.shape[2]))
        return self.core.weights(q, k)


class FusedProjected(Projected):
    """One linear layer makes q, k and v (Swin, CSwin, DeiT)."""

    def __init__(self, dim: int, core: nn.Module, *, raw_source: bool = False) -> None:
        super().__init__(dim, core, raw_source=raw_source)
        self.qkv = nn.Linear(dim, 3 * dim)

    def project(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        return q, k, v


class FamilyBlock(nn.Module):
    """``x + attention(LN(x))``, then ``x + MLP(LN(x))``, on (B, H, W, dim)."""

    def __init__(
        self, dim: int, attention: nn.Module, mlp: nn.Module, eps: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # The attention is given x itself, too: some make kernels of it.
        x = x + self.drop_path(self.attn(self.norm1(x), x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvEmbed(nn.Module):
    """Convolution, LayerNorm (eps 1e-5) and perhaps a position table: (B, H, W, in) to (.., out).

    Args:
        grid: (H, W) out, for the table and the check.
        positions: add a learned table; on another grid it is resized bilinearly.
        image: the input is an image (B, in, H, W).
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        grid: Grid,
        *,
        kernel: int,
        stride: int,
        padding: int = 0,
        positions: bool = False,
        image: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.image = grid, image
        self.conv = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)
        self.pos_embed = None
        if positions:
            self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last) if self.image else to_nchw(x)
        x = self.norm(to_nhwc(self.conv(x)))
        if self.pos_embed is None:
            return x
        table = self.pos_embed.unflatten(1, self.grid)
        if (x.shape[1], x.shape[2]) != self.grid:
            size = (x.shape[1], x.shape[2])
            table = to_nhwc(F.interpolate(to_nchw(table), size, mode="bilinear"))
        return x + table


class FamilyBackbone(Resizable, Backbone):
    """A pyramid built by its subclass's :meth:`embed` and :meth:`attend` for each stage and block.

    Class attributes, set by the subclasses: ``block_eps``, of the LayerNorms in blocks and between
    stages; ``mlp_kind``; ``stage_norms``, a LayerNorm behind each stage; ``final_norm``;
    ``may_be_dynamic``, for images of any size in windows as trained.
    """

    block_eps = 1e-5
    mlp_kind: MlpKind = "plain"
    stage_norms = False
    final_norm = True
    may_be_dynamic = False

    def __init__(self, arguments: Any) -> None:
        a = arguments
        if a.dynamic and not self.may_be_dynamic:
            raise ValueError("dynamic: only Swin takes images of any size in windows as trained")
        blocks = linear_blocks(a.types, a.depths)
        factory = attention_factory(a.attention)
        norm = partial(nn.LayerNorm, eps=self.block_eps)
        rates: Any = iter(calculate_drop_path_rates(a.drop_path_rate, sum(a.depths)))
        stages = []
        for stage, dim in enumerate(a.embed_dims):
            made = []
            for index, linear in enumerate(blocks[stage]):
                attention = self.attend(a, stage, index, factory if linear else None)
                mlp = Mlp(dim, int(dim * a.mlp_ratios[stage]), self.mlp_kind)
                made.append(FamilyBlock(dim, attention, mlp, self.block_eps, next(rates)))
            down = self.embed(a, stage) if stage else nn.Identity()
            stages.append(Stage(down, made, norm(dim) if self.stage_norms else nn.Identity()))
        width = a.embed_dims[-1]
        super().__init__(
            stem=self.embed(a, 0),
            stages=stages,
            dims=a.embed_dims,
            norm=norm(width) if self.final_norm else nn.Identity(),
            head=ClassifierHead(width, a.num_classes, a.global_pool, a.drop_rate, input_fmt="NHWC"),
            in_chans=a.in_chans,
            num_classes=a.num_classes,
            img_size=a.img_size,
        )
        self.arguments = vars(a)
        coarsest = 4 << (len(a.depths) - 1)
        if self.fixed_size() and any(side % coarsest for side in self.img_size):
            raise ValueError(f"img_size {self.img_size} is not a multiple of {coarsest}")
        self.apply(self.init_weights)

    @staticmethod
    def embed(arguments: Any, stage: int) -> nn.Module:
        """What makes (B, H, W, C) of a stage from the stage before, or from the image."""
        raise NotImplementedError

    @staticmethod
    def attend(
        arguments: Any, stage: int, index: int, factory: AttentionFactory | None
    ) -> nn.Module:
        """The attention of a block; without ``factory`` the backbone's own softmax attention."""
        raise NotImplementedError

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        """Linear layers truncated normal 0.02 with zero bias; all else as it was made."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def fixed_size(self) -> bool:
        """Whether the model takes only images of the size it was built for."""
        return True

    def forward_stem(self, x: Tensor) -> Tensor:
        built = to_2tuple(self.img_size)
        if self.fixed_size() and x.shape[-2:] != torch.Size(built):
            raise ValueError(
                f"the model was built for images of {built}, not {tuple(x.shape[-2:])}: "
                "give it img_size or call set_input_size"
            )
        return super().forward_stem(x)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are not decayed: relative position tables."""
        return {n for n, _ in self.named_parameters() if n.endswith("relative_position_bias_table")}
