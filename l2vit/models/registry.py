"""The names timm knows after ``import l2vit``, and what each is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from l2vit.models.l2vit import L2ViT
from l2vit.models.released_keys import filter_l2vit

SIZES: dict[str, dict[str, Any]] = {
    "l2vit_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2)},
    "l2vit_small": {"embed_dim": 96, "depths": (2, 2, 18, 2)},
    "l2vit_base": {"embed_dim": 128, "depths": (2, 2, 18, 2)},
    "l2vit_mini": {"embed_dim": 32, "depths": (2, 2, 2, 2)},
}
"""Table 2's models, and a miniature of the same code for tests and the quickstart."""

# The paper does not give the MLP ratio of Table 7. With 4 the first row has 29.5 M parameters and
# 5.1 G multiply-adds; with 3 all four rows have the paper's digits.
_DEEP_NARROW = {"embed_dim": 64, "depths": (4, 4, 18, 4), "mlp_ratio": 3.0}
_NO_LCM = {**SIZES["l2vit_tiny"], "lcm_kernel": 0}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "enhanced_swin_tiny_v1": (
        "Table 6, Enhanced Swin-T-V1",
        {**_NO_LCM, "global_mixer": "window", "stem": "patch"},
    ),
    "enhanced_swin_tiny_v2": (
        "Table 6, Enhanced Swin-T-V2",
        {**SIZES["l2vit_tiny"], "global_mixer": "window"},
    ),
    "l2vit_tiny_primitive": (
        "Table 6, CPE only",
        {**_NO_LCM, "use_scale": False, "stem": "patch"},
    ),
    "l2vit_tiny_unscaled": ("Table 6, CPE and conv stem", {**_NO_LCM, "use_scale": False}),
    "l2vit_tiny_no_lcm": ("Table 6, without LCM; Table 12, plain MLP", _NO_LCM),
    "l2vit_tiny_lcm3": ("Table 6, LCM of 3×3", {**SIZES["l2vit_tiny"], "lcm_kernel": 3}),
    "l2vit_tiny_deep": ("Table 7, deep-narrow", _DEEP_NARROW),
    "l2vit_tiny_deep_stem": ("Table 7, + 4-layer stem", {**_DEEP_NARROW, "stem": "conv4"}),
    "l2vit_tiny_deep_proj": (
        "Table 7, + projection",
        {**_DEEP_NARROW, "stem": "conv4", "head_hidden": 1280},
    ),
    "l2vit_tiny_plus": (
        "Table 7, + overlapped down-sampling",
        {**_DEEP_NARROW, "stem": "conv4", "head_hidden": 1280, "overlap_downsample": True},
    ),
    "l2vit_tiny_pvt2_mlp": ("Table 12, PVTv2 MLP", {**_NO_LCM, "mlp": "pvt2"}),
    "l2vit_tiny_local_mlp": ("Table 12, locally improved MLP", {**_NO_LCM, "mlp": "local"}),
}
"""Rows of the other tables: registry name, paper row, arguments of :class:`L2ViT`."""


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.layers.0",
        "classifier": "head.fc",
        "license": "mit",
        **kwargs,
    }


_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_AT_384 |= {"crop_mode": "squash"}

# No tag has a URL: the weights come from a run of this project or from the authors' files.
default_cfgs = generate_default_cfgs(
    {
        "l2vit_tiny.in1k": _cfg(),
        "l2vit_small.in1k": _cfg(),
        "l2vit_base.in1k": _cfg(),
        "l2vit_base.in22k": _cfg(num_classes=21841),
        "l2vit_base.in22k_ft_in1k": _cfg(),
        "l2vit_base.in22k_ft_in1k_384": _cfg(**_AT_384),
        "l2vit_mini.untrained": _cfg(),
        **{f"{name}.untrained": _cfg() for name in VARIANTS},
    }
)


def build(
    model_class: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Any:
    """timm's builder; made on ``device`` and then turned to ``dtype``, statistics staying fp32."""
    with contextlib.nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(model_class, variant, pretrained, **kwargs)
    return model.to(dtype)


def create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: Any) -> L2ViT:
    """Build a registered model the way timm does; a tag at 384 brings its window of 12."""
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg=kwargs.get("pretrained_cfg"))
    size = cfg.input_size[-1]
    if size != 224:
        defaults = {"img_size": size, "window_size": size // 32, **defaults}
    return build(
        L2ViT,
        variant,
        pretrained,
        pretrained_filter_fn=filter_l2vit,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


def _register(name: str, row: str, defaults: dict[str, Any]) -> Callable[..., L2ViT]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> L2ViT:
        return create(name, pretrained, defaults, kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{row}."
    entrypoint.__module__ = __name__
    globals()[name] = entrypoint  # timm looks the entry point's default_cfgs up in its module
    return register_model(entrypoint)


for _name, _size in SIZES.items():
    _register(_name, "Table 2" if _name != "l2vit_mini" else "Not in the paper", _size)
for _name, (_row, _defaults) in VARIANTS.items():
    _register(_name, _row, _defaults)
