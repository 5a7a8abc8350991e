"""FLatten and InLine under the names timm knows them by after ``import l2vit``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import nn

from l2vit.models.families.cswin import CSwin
from l2vit.models.families.deit import Deit
from l2vit.models.families.pvt import Pvt, PvtV2
from l2vit.models.families.resize import adapt_state_dict
from l2vit.models.families.swin import Swin
from l2vit.models.registry import build


@dataclass(frozen=True)
class Variant:
    """A registered model: its backbone, the backbone's arguments, and where the row comes from."""

    backbone: type[nn.Module]
    arguments: dict[str, Any]
    source: str


def _focused(backbone: type[nn.Module], source: str, types: str, **arguments: Any) -> Variant:
    return Variant(backbone, {"attention": "focused", "types": types, **arguments}, source)


def _injective(backbone: type[nn.Module], source: str, **arguments: Any) -> Variant:
    return Variant(backbone, {"attention": "injective", **arguments}, source)


_V2_NARROW = {"embed_dims": (32, 64, 160, 256)}
_NARROW_HEADS = {"num_heads": (2, 4, 10, 16)}
_WIDE_SWIN = {"embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_WIDE_CSWIN = {"embed_dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32)}
_AT_384 = {"img_size": 384, "window_size": 12}
_MINI = {"embed_dims": (32, 64, 128, 256), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}

VARIANTS = {
    "flatten_pvt_tiny": _focused(Pvt, "FLatten-PVT-T", "LLLL", depths=(2, 2, 2, 2)),
    "flatten_pvt_small": _focused(Pvt, "FLatten-PVT-S", "LLLL", depths=(3, 4, 6, 3)),
    "flatten_pvt_medium": _focused(Pvt, "FLatten-PVT-M", "LLLL", depths=(3, 4, 18, 3)),
    "flatten_pvt_base": _focused(Pvt, "FLatten-PVT-L", "LLLL", depths=(3, 8, 27, 3)),
    "flatten_pvt_v2_b0": _focused(
        PvtV2, "FLatten-PVTv2-b0", "LLLL", depths=(2, 2, 2, 2), **_V2_NARROW
    ),
    "flatten_pvt_v2_b1": _focused(PvtV2, "FLatten-PVTv2-b1", "LLLL", depths=(2, 2, 2, 2)),
    "flatten_pvt_v2_b2": _focused(PvtV2, "FLatten-PVTv2-b2", "LLLL", depths=(3, 4, 6, 3)),
    "flatten_pvt_v2_b3": _focused(PvtV2, "FLatten-PVTv2-b3", "LLLL", depths=(3, 4, 18, 3)),
    "flatten_pvt_v2_b4": _focused(PvtV2, "FLatten-PVTv2-b4", "LLLL", depths=(3, 8, 27, 3)),
    "flatten_swin_tiny": _focused(Swin, "FLatten-Swin-T", "LLSS", depths=(2, 2, 6, 2)),
    "flatten_swin_small": _focused(Swin, "FLatten-Swin-S", "LLSS", depths=(2, 2, 18, 2)),
    "flatten_swin_base": _focused(
        Swin, "FLatten-Swin-B", "LLSS", depths=(2, 2, 18, 2), **_WIDE_SWIN
    ),
    "flatten_swin_base_384": _focused(
        Swin, "FLatten-Swin-B-384", "LLSS", depths=(2, 2, 18, 2), **_WIDE_SWIN, **_AT_384
    ),
    "flatten_swin_mini": _focused(Swin, "none: a miniature for tests", "LLSS", **_MINI),
    "flatten_cswin_tiny": _focused(CSwin, "FLatten-CSwin-T", "LLSS", depths=(2, 4, 18, 1)),
    "flatten_cswin_small": _focused(CSwin, "FLatten-CSwin-S", "LLSS", depths=(2, 4, 32, 2)),
    "flatten_cswin_base": _focused(
        CSwin, "FLatten-CSwin-B", "LLSS", depths=(3, 6, 29, 2), **_WIDE_CSWIN
    ),
    "flatten_cswin_base_384": _focused(
        CSwin, "FLatten-CSwin-B-384", "LLSS", depths=(3, 6, 29, 2), **_WIDE_CSWIN, **_AT_384
    ),
    "inline_deit_tiny": _injective(Deit, "InLine-DeiT-T", embed_dim=192, num_heads=6),
    "inline_deit_small": _injective(
        Deit, "InLine-DeiT-S", embed_dim=320, num_heads=10, img_size=288
    ),
    "inline_deit_base": _injective(
        Deit, "InLine-DeiT-B", embed_dim=384, num_heads=12, img_size=448
    ),
    "inline_pvt_tiny": _injective(
        Pvt, "InLine-PVT-T", types="IIII", depths=(2, 2, 2, 2), **_NARROW_HEADS
    ),
    "inline_pvt_small": _injective(
        Pvt, "InLine-PVT-S", types="IIII", depths=(3, 4, 6, 3), **_NARROW_HEADS
    ),
    "inline_pvt_medium": _injective(
        Pvt, "InLine-PVT-M", types="IIII", depths=(3, 4, 18, 3), **_NARROW_HEADS
    ),
    "inline_pvt_large": _injective(
        Pvt, "InLine-PVT-L", types="IIII", depths=(3, 8, 27, 3), **_NARROW_HEADS
    ),
    "inline_swin_tiny": _injective(Swin, "InLine-Swin-T", types="IIIS", depths=(2, 2, 6, 2)),
    "inline_swin_small": _injective(Swin, "InLine-Swin-S", types="IISS", depths=(2, 2, 18, 2)),
    "inline_swin_base": _injective(
        Swin, "InLine-Swin-B", types="IIMS2", depths=(2, 2, 18, 2), **_WIDE_SWIN
    ),
    "inline_swin_base_384": _injective(
        Swin, "InLine-Swin-B-384", types="IIMS2", depths=(2, 2, 18, 2), **_WIDE_SWIN, **_AT_384
    ),
    "inline_swin_mini": _injective(Swin, "none: a miniature for tests", types="IIIS", **_MINI),
    "inline_cswin_tiny": _injective(CSwin, "InLine-CSwin-T", types="IISS", depths=(2, 4, 18, 1)),
    "inline_cswin_small": _injective(CSwin, "InLine-CSwin-S", types="IISS", depths=(3, 6, 29, 2)),
    "inline_cswin_base": _injective(
        CSwin, "InLine-CSwin-B", types="IISS", depths=(3, 6, 29, 2), **_WIDE_CSWIN
    ),
    "inline_cswin_base_384": _injective(
        CSwin, "InLine-CSwin-B-384", types="IISS", depths=(3, 6, 29, 2), **_WIDE_CSWIN, **_AT_384
    ),
}
"""FLatten and InLine."""

_PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("8", {}),
    "xca": ("8", {}),
    "cosformer": ("8", {}),
    "efficient": ("8", {}),
    "sima": ("8 (SimA), Table 1 (L1 norm)", {}),
    "linear": ("8 (linear), Table 1 (ReLU)", {}),
    "leaky": ("1 (LeakyReLU)", {}),
    "enhanced": ("8 (enhanced linear), Table 1", {"lcm_kernel": 3}),
}
PEERS = {
    f"deit_tiny_{name}": Variant(
        Deit, {"attention": name, **arguments}, f"L²ViT paper, Table {table}"
    )
    for name, (table, arguments) in _PEERS.items()
}
"""DeiT-Tiny with each attention that the L²ViT paper compares."""
PEERS["deit_tiny_mixed"] = Variant(
    Deit,
    {"attention": "enhanced", "lcm_kernel": 3, "softmax_blocks": (0, 2, 4, 6, 8, 10)},
    "L²ViT paper, Table 11",
)


def _cfg(variant: Variant) -> dict[str, Any]:
    height, width = to_2tuple(variant.arguments.get("img_size", 224))
    straight = variant.source.endswith("Swin-B-384") and "CSwin" not in variant.source
    is_deit = variant.backbone is Deit
    free = variant.backbone in (Pvt, PvtV2) and variant.arguments["attention"] != "focused"
    return {
        "num_classes": 1000,
        "input_size": (3, height, width),
        "pool_size": None if is_deit else (height // 32, width // 32),
        "fixed_input_size": not free,
        "crop_pct": 1.0 if straight else 0.875,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj" if is_deit else "stem.conv",
        "classifier": "head" if is_deit else "head.fc",
    }


default_cfgs = generate_default_cfgs({name: _cfg(v) for name, v in (VARIANTS | PEERS).items()})


def _register(name: str, variant: Variant) -> None:
    indices = (2, 5, 8, 11) if variant.backbone is Deit else (0, 1, 2, 3)

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(
            variant.backbone,
            name,
            pretrained,
            feature_cfg={"out_indices": indices, "feature_cls": "getter"},
            pretrained_filter_fn=adapt_state_dict,
            **{**variant.arguments, **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{variant.source}; arguments as :class:`{variant.backbone.__name__}`."
    setattr(sys.modules[__name__], name, create)
    register_model(create)


for _name, _variant in (VARIANTS | PEERS).items():
    _register(_name, _variant)
