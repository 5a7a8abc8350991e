"""The names timm knows after ``import l2vit``, and what each is made of."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from l2vit.models.l2vit import L2ViT


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


default_cfgs = generate_default_cfgs(
    {"l2vit_tiny": _cfg(), "l2vit_small": _cfg(), "l2vit_base": _cfg(), "l2vit_mini": _cfg()}
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: Any) -> L2ViT:
    return build_model_with_cfg(
        L2ViT,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def l2vit_tiny(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L²ViT-T (Table 2)."""
    return _create("l2vit_tiny", pretrained, {"embed_dim": 96, "depths": (2, 2, 6, 2)}, kwargs)


@register_model
def l2vit_small(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L²ViT-S (Table 2)."""
    return _create("l2vit_small", pretrained, {"embed_dim": 96, "depths": (2, 2, 18, 2)}, kwargs)


@register_model
def l2vit_base(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L²ViT-B (Tables 2, 3)."""
    return _create("l2vit_base", pretrained, {"embed_dim": 128, "depths": (2, 2, 18, 2)}, kwargs)


@register_model
def l2vit_mini(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """A miniature of the same code for tests and the quickstart; not in the paper."""
    return _create("l2vit_mini", pretrained, {"embed_dim": 32, "depths": (2, 2, 2, 2)}, kwargs)
