"""The timm contract of a backbone with stages, once for L²ViT and for the families beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, to_2tuple
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from l2vit.models.layers import to_nchw
from l2vit.models.ops.recompute import recompute

try:
    from timm.models._input import update_model_input_size
except ImportError:  # an older timm writes no arguments beside the weights it saves

    def update_model_input_size(  # type: ignore[misc]
        model: nn.Module, img_size: Any, **model_args: Any
    ) -> None: ...


class Stage(nn.Module):
    """Down-sampling (none in the first stage), blocks, a norm; recomputes blocks if asked to."""

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm if norm is not None else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor, kept: Sequence[Any] | None = None) -> Tensor:
        """``kept``: for each block what `Backbone.draw_paths` drew for it."""
        x = self.downsample(x)
        for index, block in enumerate(self.blocks):
            drawn = () if kept is None else (kept[index],)
            x = recompute(block, x, *drawn) if self.grad_checkpointing else block(x, *drawn)
        return self.norm(x)


def _pooled_width(head: ClassifierHead) -> int:
    """Channels that the head's classifier gets: pooling "catavgmax" doubles them."""
    return head.in_features * head.global_pool.feat_mult()


class Backbone(nn.Module):
    """Image (B, in_chans, H, W) through a stem and stages (B, H, W, C) to logits.

    Args:
        stem: image to the first stage's (B, H/4, W/4, C).
        stages: each halves the grid but the first.
        dims: channels per stage.
        norm: behind the last stage.
        head: pools and classifies (B, H, W, C).
        project: between norm and head, on every position.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        norm: nn.Module,
        head: ClassifierHead,
        *,
        in_chans: int,
        num_classes: int,
        img_size: int | tuple[int, int],
        project: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.output_fmt = "NHWC"
        self.num_features = dims[-1]
        self.head_hidden_size = _pooled_width(head)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": 4 << stage, "module": f"stages.{stage}"}
            for stage, dim in enumerate(dims)
        ]
        self.grad_checkpointing = False
        self.draws_paths_at_once = False
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        self.project = project if project is not None else nn.Identity()
        self.head = head

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
            (r"^stages\.(\d+)\.norm", (99999,)),
            (r"^(?:norm|project)", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute stem and blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if isinstance(module, Backbone | Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes`` (0: none); ``global_pool`` "avg", "max", ... or ""."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        like = next(self.parameters())  # a head without classifier does not know where to make one
        self.head.to(like.device, like.dtype)
        self.head_hidden_size = _pooled_width(self.head)

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
        x = self.forward_stem(x)
        kept = self.draw_paths(x)
        for index, stage in enumerate(self.stages):
            if stop_early and index > last:
                break
            x = stage(x, kept[index])
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
        """Drop what the intermediates ``indices`` do not need; returns the indices kept.

        The head goes, too, with the features that it was made for; ``reset_classifier`` makes one
        for those that are left.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        if prune_norm or shorter:
            self.norm = nn.Identity()
        self.stages = self.stages[: last + 1]
        if prune_head or shorter:
            self.project = nn.Identity()
            self.num_features = self.head.in_features = int(self.feature_info[last]["num_chs"])
            self.reset_classifier(0, "")
        return take

    def forward_stem(self, x: Tensor) -> Tensor:
        """The image (B, in_chans, H, W) as the first stage takes it, (B, H/4, W/4, C)."""
        return recompute(self.stem, x) if self.grad_checkpointing else self.stem(x)

    def draw_paths(self, x: Tensor) -> Sequence[Any]:
        """Stochastic depth of a forward pass, for each stage what its blocks take; None: each
        draws for itself. A network that can draw for all of them does if ``draws_paths_at_once``.
        """
        return [None] * len(self.stages)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised features of the last stage, (B, H/32, W/32, C)."""
        x = self.forward_stem(x)
        for stage, kept in zip(self.stages, self.draw_paths(x), strict=True):
            x = stage(x, kept)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits, or to the pooled (B, head_hidden_size) before the classifier."""
        return self.head(self.project(x), pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def reshape_transform(maps: Tensor) -> Tensor:
    """Maps of our layers, (B, H, W, C), as CAM tools want them: (B, C, H, W).

    Give it to ``pytorch_grad_cam.GradCAM(model, layers, reshape_transform=reshape_transform)``:
    without it such tools take the rows of the map for its channels and draw nonsense.
    """
    return to_nchw(maps)
