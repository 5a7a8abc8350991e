"""L²ViT (arXiv 2501.16182) and, by arguments, every variant of its tables."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2vit.models.layers import (
    HEAD_WIDTH,
    BatchNorm2d,
    ConditionalPosition,
    LinearAttention,
    LocalConcentration,
    Mlp,
    MlpKind,
    WindowAttention,
    frozen_statistics,
    pad_to_multiple,
    to_nchw,
    to_nhwc,
)

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
        bottom, right = -x.shape[2] % 4, -x.shape[3] % 4
        if torch.compiler.is_exporting() or bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
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
        x = pad_to_multiple(self.norm(x), 2, 2)
        return to_nhwc(self.conv(to_nchw(x)))


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
        self.lcm_norm = nn.LayerNorm(dim) if lcm_kernel else None
        self.lcm = LocalConcentration(dim, lcm_kernel) if lcm_kernel else None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), mlp)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def attend(self, x: Tensor) -> Tensor:
        """Attention over the whole (B, H, W, dim) map or inside its windows."""
        if isinstance(self.attn, WindowAttention):
            return self.attn(x)
        return self.attn(x.flatten(1, 2)).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path(self.attend(self.norm1(x)))
        x = self.cpe2(x)
        if self.lcm is not None and self.lcm_norm is not None:
            x = x + self.drop_path(self.lcm(self.lcm_norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Down-sampling (none in the first stage), then blocks; recomputes blocks if asked to."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, context_fn=_recompute_contexts)
            else:
                x = block(x)
        return x


def _recompute_contexts() -> tuple[Any, Any]:
    """The second forward of a checkpointed block must not count in BatchNorm's statistics."""
    return contextlib.nullcontext(), frozen_statistics()


class L2ViT(nn.Module):
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
        order: Literal["auto", "kv", "qk"] = "auto",
        mlp: MlpKind = "plain",
        head_hidden: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.output_fmt = "NHWC"
        self.img_size = _pair(img_size)
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        self.num_features = dims[-1]
        self.head_hidden_size = head_hidden or dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"stages.{stage}"}
            for stage, dim in enumerate(dims)
        ]

        self.stem = Stem(in_chans, embed_dim, stem)
        rates: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
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
            self.stages.append(Stage(down, blocks))
        self.norm: nn.Module = nn.LayerNorm(dims[-1])
        self.project: nn.Module = (
            nn.Sequential(nn.Linear(dims[-1], head_hidden), nn.ReLU())
            if head_hidden
            else nn.Identity()
        )
        self.head = ClassifierHead(
            self.head_hidden_size, num_classes, global_pool, drop_rate, input_fmt="NHWC"
        )
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names exempt from weight decay although they have more than one dimension: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns from which timm groups parameters by depth (layer decay)."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(norm|project)", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes`` (0: none); ``global_pool`` "avg", "max", ... or ""."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | None = None,
    ) -> None:
        """Change the intended input size and the window; no parameter changes shape."""
        if img_size is not None:
            self.img_size = _pair(img_size)
        if window_size is not None:
            for module in self.modules():
                if isinstance(module, WindowAttention):
                    module.window_size = window_size

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features and the outputs of the stages ``indices`` (all if None, last n if int).

        Args:
            norm: apply the final norm to the last stage's output.
            stop_early: leave out the stages after the last index.
            output_fmt: NCHW or NHWC, of the intermediates; the final features are NHWC.
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r} is neither NCHW nor NHWC")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            if stop_early and index > last:
                break
            x = stage(x)
            if index in take:
                y = self.norm(x) if norm and index == len(self.stages) - 1 else x
                intermediates.append(to_nchw(y) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        if not stop_early or last == len(self.stages) - 1:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the intermediates ``indices`` do not need; returns the indices kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last < len(self.stages) - 1:
            self.norm = nn.Identity()
        if prune_head:
            self.project = nn.Identity()
            self.reset_classifier(0, "")
        self.stages = self.stages[: last + 1]
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised features of the last stage, (B, H/32, W/32, C)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits, or to the pooled (B, head_hidden_size) before the classifier."""
        return self.head(self.project(x), pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
