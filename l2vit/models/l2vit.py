"""L²ViT (arXiv 2501.16182) and, by arguments, every variant of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from l2vit.models import ops
from l2vit.models.backbone import Backbone, Stage, update_model_input_size
from l2vit.models.layers import (
    BatchNorm2d,
    DepthwiseConv,
    Mlp,
    MlpKind,
    Observer,
    crop,
    normalized_beside,
    pad_to_multiple,
    require_one_of,
    to_nchw,
    to_nhwc,
    unobserved,
)
from l2vit.models.ops.reference import linear_attention_weights

HEAD_WIDTH = 32
StemKind = Literal["conv", "conv4", "patch"]
MixerKind = Literal["linear", "window"]


class Stem(nn.Module):
    """Image (B, in_chans, H, W) to features (B, ⌈H/4⌉, ⌈W/4⌉, dim), LayerNorm included.

    Args:
        in_chans: channels of the image.
        dim: channels out.
        kind: conv, two 3×3 convs of stride 2 (Sec. 4.3); conv4, two more of stride 1 between them
            (Table 7); patch, one 4×4 conv of stride 4 (Table 6).
    """

    def __init__(self, in_chans: int, dim: int, kind: StemKind = "conv") -> None:
        super().__init__()
        require_one_of("stem", kind, StemKind)
        if kind == "patch":
            layers: list[nn.Module] = [nn.Conv2d(in_chans, dim, 4, stride=4)]
        else:
            layers = [nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1), BatchNorm2d(dim // 2)]
            for _ in range(2 if kind == "conv4" else 0):
                layers += [nn.ReLU(), nn.Conv2d(dim // 2, dim // 2, 3, padding=1)]
                layers += [BatchNorm2d(dim // 2)]
            layers += [nn.ReLU(), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)]
            layers += [BatchNorm2d(dim)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = to_nchw(pad_to_multiple(to_nhwc(x), 4))
        x = self.layers(x.contiguous(memory_format=torch.channels_last))
        return self.norm(to_nhwc(x))


class Downsample(nn.Module):
    """LayerNorm, then a conv of stride 2: (B, H, W, dim) to (B, ⌈H/2⌉, ⌈W/2⌉, out).

    Args:
        overlap: 3×3 conv with padding 1 (Table 7) instead of 2×2.
    """

    def __init__(self, dim: int, out: int, *, overlap: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = (
            nn.Conv2d(dim, out, 3, stride=2, padding=1)
            if overlap
            else nn.Conv2d(dim, out, 2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(self.norm(x), 2)
        return to_nhwc(self.conv(to_nchw(x)))


class ConditionalPosition(nn.Module):
    """CPE (Sec. 4.3): ``x + depthwise 3×3 conv(x)``, with bias; (B, H, W, C) to the same."""

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = DepthwiseConv(dim, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        if ops.fuses_residual_conv(x) and unobserved(self.conv, DepthwiseConv):
            weight, bias = self.conv.weight, self.conv.bias
            return to_nhwc(ops.residual_depthwise_conv(to_nchw(x), weight, bias))
        return x + to_nhwc(self.conv(to_nchw(x)))


class LinearAttention(nn.Module):
    """Enhanced linear attention (eq. 4, Sec. 4.1, 4.2) over all tokens of (B, ..., C).

    Args:
        dim: C.
        num_heads: divides ``dim``.
        use_scale: learn s, one factor per head, initially ``head_width^-0.5``; else s = 1.
        clamp: lower bound of the denominator (Table 10).
        order: auto multiplies q kᵀ first when N < head width (Sec. 11); the result is the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        use_scale: bool = True,
        clamp: float = 100.0,
        order: ops.Order = "auto",
    ) -> None:
        super().__init__()
        require_one_of("order", order, ops.Order)
        self.num_heads, self.clamp, self.order = num_heads, clamp, order
        factor = torch.full((num_heads, 1, 1), (dim // num_heads) ** -0.5)
        self.scale = nn.Parameter(factor) if use_scale else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.observer: Observer | None = None

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.observer is not None:
            self.observer(ops.linear_attention_denominators(qkv, self.num_heads))
        return self.proj(
            ops.linear_attention(qkv, self.scale, self.num_heads, self.clamp, self.order)
        )

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Tensor:
        """The weights that each token gives to each other, (B, heads, N, N), for pictures."""
        q, k, _ = ops.split_qkv(self.qkv(x.flatten(1, -2)), self.num_heads)
        return linear_attention_weights(q, k, self.scale, self.clamp)


class WindowAttention(nn.Module):
    """Softmax attention (eq. 1) inside non-overlapping windows of a (B, H, W, C) feature map.

    A map that the window does not divide is zero-padded on the bottom and right; the padding takes
    part in the softmax, then is cropped (the released weights were trained so).
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 7) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        x = pad_to_multiple(x, self.window_size)
        x = self.proj(ops.window_attention(self.qkv(x), self.num_heads, self.window_size))
        return crop(x, height, width)  # projected first, as the published operations count it


class LocalConcentration(nn.Module):
    """LCM (eq. 6, 7): depthwise conv, GELU, BatchNorm, depthwise conv; (B, H, W, C) to the same."""

    def __init__(self, dim: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv1 = DepthwiseConv(dim, kernel_size)
        self.norm = BatchNorm2d(dim)
        self.conv2 = DepthwiseConv(dim, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        if self._fuses(x):
            return self._fused(x)
        x = self.norm(F.gelu(self.conv1(to_nchw(x))))
        return to_nhwc(self.conv2(x))

    def _fuses(self, x: Tensor) -> bool:
        """Whether the kernels run that take norm and GELU along with the convolutions."""
        return (
            unobserved(self.conv1, DepthwiseConv)
            and unobserved(self.norm, BatchNorm2d)
            and unobserved(self.conv2, DepthwiseConv)
            and self.conv1.bias is not None
            and self.conv2.bias is not None
            and self.norm.training
            and self.norm.track_running_stats
            and ops.fuses_local_concentration(x, self.conv1.weight)
        )

    def _fused(self, x: Tensor) -> Tensor:
        norm = self.norm
        update, momentum = norm.count_batch()
        running = (norm.running_mean, norm.running_var) if update else (None, None)
        return ops.local_concentration(
            x,
            (self.conv1.weight, self.conv1.bias),
            (norm.weight, norm.bias),
            (self.conv2.weight, self.conv2.bias),
            running,
            momentum,
            norm.eps,
        )


class Block(nn.Module):
    """LWA or LGA block (Fig. 3) on (B, H, W, dim).

    Args:
        attention: a WindowAttention (LWA) or a LinearAttention (LGA).
        lcm_kernel: kernel of the local concentration module; 0 for none.
        second_cpe: a second conditional position before the MLP (LWA).
        drop_path: probability that a residual branch is skipped for an image.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        *,
        lcm_kernel: int,
        second_cpe: bool,
        mlp: MlpKind,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.cpe1 = ConditionalPosition(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.cpe2 = ConditionalPosition(dim) if second_cpe else nn.Identity()
        self.lcm_norm = nn.LayerNorm(dim) if lcm_kernel else nn.Identity()
        self.lcm = LocalConcentration(dim, lcm_kernel) if lcm_kernel else None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), mlp)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, kept: Sequence[Tensor | None] = (None, None, None)) -> Tensor:
        x = self.cpe1(x)
        x = self.add(x, self.norm1, self.attn, kept[0])
        x = self.cpe2(x)
        if self.lcm is not None:
            x = self.add(x, self.lcm_norm, self.lcm, kept[1])
        return self.add(x, self.norm2, self.mlp, kept[2])

    def add(self, x: Tensor, norm: nn.Module, branch: nn.Module, kept: Tensor | None) -> Tensor:
        """``x + drop_path(branch(norm(x)))``; ``kept`` (B,): the factors of drop path, where drawn
        for all blocks."""
        x, normalized = normalized_beside(x, norm)
        if kept is None or isinstance(self.drop_path, nn.Identity):
            return x + self.drop_path(branch(normalized))
        return ops.add_scaled(x, branch(normalized), kept.view(-1, 1, 1, 1))


class L2ViT(Backbone):
    """Image (B, in_chans, H, W) of any size to logits (B, num_classes).

    Args:
        img_size: the size the model is meant for; any other size works too.
        embed_dim: channels of the first stage; each later stage doubles them.
        depths: blocks per stage; in each, LWA and LGA alternate, LWA first.
        window_size: of the window attention (7; 12 at 384).
        stem: see :class:`Stem`.
        overlap_downsample: see :class:`Downsample`.
        global_mixer: attention of the LGA blocks; window makes Table 6's Enhanced Swin.
        lcm_kernel: see :class:`Block`.
        use_scale, clamp, order: see :class:`LinearAttention`.
        mlp: see :class:`Mlp` (Table 12).
        head_hidden: channels of a linear layer and ReLU on every position before the mean
            (Table 7); 0 for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; grows linearly from 0 over all blocks.

    Raises:
        ValueError: an unknown kind, or an embed_dim or lcm_kernel that cannot be.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        stem: StemKind = "conv",
        overlap_downsample: bool = False,
        global_mixer: MixerKind = "linear",
        lcm_kernel: int = 7,
        use_scale: bool = True,
        clamp: float = 100.0,
        order: ops.Order = "auto",
        mlp: MlpKind = "plain",
        head_hidden: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        require_one_of("global_mixer", global_mixer, MixerKind)
        _require_sizes(embed_dim, lcm_kernel, window_size)
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        rates: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for stage, dim in enumerate(dims):
            heads = dim // HEAD_WIDTH
            blocks = []
            for index in range(depths[stage]):
                is_global = index % 2 == 1
                attention: nn.Module = (
                    LinearAttention(dim, heads, use_scale=use_scale, clamp=clamp, order=order)
                    if is_global and global_mixer == "linear"
                    else WindowAttention(dim, heads, window_size)
                )
                blocks.append(
                    Block(
                        dim,
                        attention,
                        lcm_kernel=lcm_kernel if is_global else 0,
                        second_cpe=not is_global,
                        mlp=mlp,
                        mlp_ratio=mlp_ratio,
                        drop_path=next(rates),
                    )
                )
            down = (
                Downsample(dims[stage - 1], dim, overlap=overlap_downsample)
                if stage
                else nn.Identity()
            )
            stages.append(Stage(down, blocks))
        width = head_hidden or dims[-1]
        super().__init__(
            stem=Stem(in_chans, embed_dim, stem),
            stages=stages,
            dims=dims,
            norm=nn.LayerNorm(dims[-1]),
            project=(
                nn.Sequential(nn.Linear(dims[-1], head_hidden), nn.ReLU()) if head_hidden else None
            ),
            head=ClassifierHead(width, num_classes, global_pool, drop_rate, input_fmt="NHWC"),
            in_chans=in_chans,
            num_classes=num_classes,
            img_size=img_size,
        )
        self.window_size = window_size
        self.drop_path_rate, self.depth = drop_path_rate, sum(depths)
        self._model_args = {"window_size": window_size}  # timm writes it beside saved weights
        self.apply(_init_weights)

    def draw_paths(self, x: Tensor) -> Sequence[Any]:
        if not (self.draws_paths_at_once and self.training and self.drop_path_rate > 0):
            return super().draw_paths(x)
        rates = torch.linspace(0, self.drop_path_rate, self.depth, device=x.device)[:, None, None]
        drawn = torch.rand(self.depth, 3, x.shape[0], device=x.device)
        kept = ((drawn >= rates) / (1 - rates)).to(x.dtype)
        depths = [len(cast(Stage, stage).blocks) for stage in self.stages]
        return kept[: sum(depths)].split(depths)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | None = None,
    ) -> None:
        """Change the intended input size and the window; no parameter changes shape.

        Raises:
            ValueError: a window that is not a positive whole number.
        """
        if window_size is not None:
            _require_window(window_size)
            self.window_size = window_size
            for module in self.modules():
                if isinstance(module, WindowAttention):
                    module.window_size = window_size
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        update_model_input_size(self, self.img_size, window_size=self.window_size)


def _require_sizes(embed_dim: int, lcm_kernel: int, window_size: int) -> None:
    if embed_dim < HEAD_WIDTH or embed_dim % HEAD_WIDTH:
        raise ValueError(f"embed_dim {embed_dim} is no multiple of the head width {HEAD_WIDTH}")
    if lcm_kernel and lcm_kernel % 2 == 0:
        raise ValueError(f"lcm_kernel {lcm_kernel} is neither odd nor 0 (none)")
    _require_window(window_size)


def _require_window(window_size: int) -> None:
    if not isinstance(window_size, int) or window_size < 1:
        raise ValueError(f"window_size {window_size} is not a positive whole number")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
