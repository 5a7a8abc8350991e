"""Names of tensors in the files that the authors released, and ours for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

L2VIT = "L2ViT"
REBUILT = ("relative_position_index", "attn_mask")
"""Ends of the names of tensors that the networks make from their sizes."""

_CORE = r"(scale|positional_encoding|dwc\..+|residual\..+)"
_BLOCK = r"(norm1\..+|norm2\..+|mlp\.fc[12]\..+)"
_PYRAMID_TAIL = [(r"norm\.(.+)", r"norm.\1"), (r"head\.(.+)", r"head.fc.\1")]

# "<1>" is group 1 minus one: these files count from one.
_PVT_RULES = [
    (r"pos_embed1", "stem.pos_embed"),
    (r"patch_embed1\.proj\.(.+)", r"stem.conv.\1"),
    (r"patch_embed1\.norm\.(.+)", r"stem.norm.\1"),
    (r"pos_embed(\d)", r"stages.<1>.downsample.pos_embed"),
    (r"patch_embed(\d)\.proj\.(.+)", r"stages.<1>.downsample.conv.\2"),
    (r"patch_embed(\d)\.norm\.(.+)", r"stages.<1>.downsample.norm.\2"),
    (rf"block(\d)\.(\d+)\.{_BLOCK}", r"stages.<1>.blocks.\2.\3"),
    (r"block(\d)\.(\d+)\.attn\.((?:q|kv|proj|norm)\..+)", r"stages.<1>.blocks.\2.attn.\3"),
    (r"block(\d)\.(\d+)\.attn\.sr\.(.+)", r"stages.<1>.blocks.\2.attn.reduce.\3"),
    (rf"block(\d)\.(\d+)\.attn\.{_CORE}", r"stages.<1>.blocks.\2.attn.core.\3"),
    (r"head\.(.+)", r"head.fc.\1"),
]
_RULES: dict[str, list[tuple[str, str]]] = {
    L2VIT: [
        (r"downsample_layers\.0\.proj\.proj\.(\d)\.(.+)", r"stem.layers.\1.\2"),
        (r"downsample_layers\.0\.norm\.(.+)", r"stem.norm.\1"),
        (r"downsample_layers\.([1-9])\.proj\.(.+)", r"stages.\1.downsample.conv.\2"),
        (r"downsample_layers\.([1-9])\.norm\.(.+)", r"stages.\1.downsample.norm.\2"),
        (r"stages\.(\d)\.(\d+)\.cpe\.0\.proj\.(.+)", r"stages.\1.blocks.\2.cpe1.conv.\3"),
        (r"stages\.(\d)\.(\d+)\.cpe\.1\.proj\.(.+)", r"stages.\1.blocks.\2.cpe2.conv.\3"),
        (r"stages\.(\d)\.(\d+)\.attn\.temperature", r"stages.\1.blocks.\2.attn.scale"),
        (r"stages\.(\d)\.(\d+)\.norm3\.(.+)", r"stages.\1.blocks.\2.lcm_norm.\3"),
        (r"stages\.(\d)\.(\d+)\.local_mp\.bn\.(.+)", r"stages.\1.blocks.\2.lcm.norm.\3"),
        (r"stages\.(\d)\.(\d+)\.local_mp\.(conv[12]\..+)", r"stages.\1.blocks.\2.lcm.\3"),
        (
            r"stages\.(\d)\.(\d+)\.((?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\..+)",
            r"stages.\1.blocks.\2.\3",
        ),
        (r"norm\.(.+)", r"norm.\1"),
        (r"head\.(.+)", r"head.fc.\1"),
    ],
    "Pvt": _PVT_RULES,
    "PvtV2": [
        *_PVT_RULES,
        (r"block(\d)\.(\d+)\.mlp\.dwconv\.dwconv\.(.+)", r"stages.<1>.blocks.\2.mlp.conv.\3"),
        (r"norm(\d)\.(.+)", r"stages.<1>.norm.\2"),
    ],
    "Swin": [
        (r"patch_embed\.proj\.(.+)", r"stem.conv.\1"),
        (r"patch_embed\.norm\.(.+)", r"stem.norm.\1"),
        (rf"layers\.(\d)\.blocks\.(\d+)\.{_BLOCK}", r"stages.\1.blocks.\2.\3"),
        (r"layers\.(\d)\.blocks\.(\d+)\.attn\.((?:qkv|proj)\..+)", r"stages.\1.blocks.\2.attn.\3"),
        (rf"layers\.(\d)\.blocks\.(\d+)\.attn\.{_CORE}", r"stages.\1.blocks.\2.attn.core.\3"),
        (
            r"layers\.(\d)\.blocks\.(\d+)\.attn\.(relative_position_bias_table)",
            r"stages.\1.blocks.\2.attn.core.bias.\3",
        ),
        (r"layers\.0\.downsample\.(.+)", r"stages.1.downsample.\1"),
        (r"layers\.1\.downsample\.(.+)", r"stages.2.downsample.\1"),
        (r"layers\.2\.downsample\.(.+)", r"stages.3.downsample.\1"),
        *_PYRAMID_TAIL,
    ],
    "CSwin": [
        (r"stage1_conv_embed\.0\.(.+)", r"stem.conv.\1"),
        (r"stage1_conv_embed\.2\.(.+)", r"stem.norm.\1"),
        (rf"stage(\d)\.(\d+)\.{_BLOCK}", r"stages.<1>.blocks.\2.\3"),
        (r"stage(\d)\.(\d+)\.((?:qkv|proj)\..+)", r"stages.<1>.blocks.\2.attn.\3"),
        (
            r"stage(\d)\.(\d+)\.attns\.(\d)\.(get_v\..+)",
            r"stages.<1>.blocks.\2.attn.core.branches.\3.\4",
        ),
        (
            rf"stage(\d)\.(\d+)\.attns\.(\d)\.{_CORE}",
            r"stages.<1>.blocks.\2.attn.core.branches.\3.core.\4",
        ),
        (r"merge(\d)\.((?:conv|norm)\..+)", r"stages.\1.downsample.\2"),
        *_PYRAMID_TAIL,
    ],
    "Deit": [
        (r"(cls_token|pos_embed)", r"\1"),
        (r"(patch_embed\.proj\..+)", r"\1"),
        (rf"blocks\.(\d+)\.{_BLOCK}", r"blocks.\1.\2"),
        (r"blocks\.(\d+)\.attn\.((?:qkv|proj)\..+)", r"blocks.\1.attn.\2"),
        (rf"blocks\.(\d+)\.attn\.{_CORE}", r"blocks.\1.attn.core.\2"),
        (r"((?:norm|head)\..+)", r"\1"),
    ],
}
"""From a released key to ours, by the class of the network."""


def rename(network: str, key: str) -> str | None:
    """Our name for a released key.

    Args:
        network: name of the model's class: L2ViT, Pvt, PvtV2, Swin, CSwin or Deit.
        key: as in the file.

    Returns:
        None for a key that the network does not have.
    """
    for pattern, replacement in _RULES[network]:
        match = re.fullmatch(pattern, key)
        if match is not None:
            if "<1>" in replacement:
                replacement = replacement.replace("<1>", str(int(match[1]) - 1))
            return match.expand(replacement)
    return None


def filter_l2vit(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """For timm's loader: a state dict in our names, whichever of the two it comes in."""
    if not any(key.startswith("downsample_layers.") for key in state_dict):
        return dict(state_dict)
    return {rename(L2VIT, key) or key: value for key, value in state_dict.items()}
