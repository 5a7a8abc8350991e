"""Reading the files that the authors of FLatten and InLine released (families.md section 5)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from l2vit.errors import UserError
from l2vit.models.families import VARIANTS
from l2vit.models.host import resize_tables
from l2vit.models.host_cswin import CSwin
from l2vit.models.host_deit import Deit
from l2vit.models.host_pvt import Pvt, PvtV2
from l2vit.models.host_swin import Swin
from l2vit.models.released import choose_weights, read_pickle, require_fit

EMA_KEY = "state_dict_ema"
_REBUILT = ("relative_position_index", "attn_mask")
_UNUSED = ("norm.weight", "norm.bias")
_CORE = r"(scale|positional_encoding|dwc\..+|residual\..+)"
_BLOCK = r"(norm1\..+|norm2\..+|mlp\.fc[12]\..+)"
_PYRAMID_TAIL = [(r"norm\.(.+)", r"norm.\1"), (r"head\.(.+)", r"head.fc.\1")]

# From a released key to ours, per host. "<1>" is group 1 minus one: these files count from one.
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
_RULES: dict[type, list[tuple[str, str]]] = {
    Pvt: _PVT_RULES,
    PvtV2: [
        *_PVT_RULES,
        (r"block(\d)\.(\d+)\.mlp\.dwconv\.dwconv\.(.+)", r"stages.<1>.blocks.\2.mlp.conv.\3"),
        (r"norm(\d)\.(.+)", r"stages.<1>.norm.\2"),
    ],
    Swin: [
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
    CSwin: [
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
    Deit: [
        (r"(cls_token|pos_embed)", r"\1"),
        (r"(patch_embed\.proj\..+)", r"\1"),
        (rf"blocks\.(\d+)\.{_BLOCK}", r"blocks.\1.\2"),
        (r"blocks\.(\d+)\.attn\.((?:qkv|proj)\..+)", r"blocks.\1.attn.\2"),
        (rf"blocks\.(\d+)\.attn\.{_CORE}", r"blocks.\1.attn.core.\2"),
        (r"((?:norm|head)\..+)", r"\1"),
    ],
}


@dataclass(frozen=True)
class ReleasedFamily:
    """A released file in our names.

    Attributes:
        model: registry name.
        weights: parameters by the model's names, fp32.
        model_args: constructor arguments besides ``num_classes``.
        which: raw or ema.
        report: what was dropped, resized and taken, one line each.
    """

    model: str
    weights: dict[str, Tensor]
    model_args: dict[str, Any]
    which: str
    report: tuple[str, ...]


def rename(host: type, key: str) -> str | None:
    """Our name for a released key of ``host``; None for a key it does not have."""
    for pattern, replacement in _RULES[host]:
        match = re.fullmatch(pattern, key)
        if match is not None:
            if "<1>" in replacement:
                replacement = replacement.replace("<1>", str(int(match[1]) - 1))
            return match.expand(replacement)
    return None


def convert_released(
    path: Path,
    model_name: str,
    *,
    ema: bool | None = None,
    input_size: int | None = None,
    window_size: int | None = None,
) -> ReleasedFamily:
    """Read a file released by the authors of FLatten or InLine as ``model_name``.

    Args:
        path: the pickle; its weights under ``model``, ``state_dict_ema`` or nothing.
        model_name: registry name; the file does not say what it is.
        ema: which weights, where there are both; None prefers the averaged ones.
        input_size: pixels; position tables are resized to it. None takes the model's own.
        window_size: of the softmax blocks; None takes the model's own.

    Raises:
        UserError: not such a file, or unknown, missing or mis-shaped tensors; names them.
    """
    variant = VARIANTS.get(model_name)
    if variant is None:
        raise UserError(f"{model_name!r} is no FLatten or InLine model; known: {_known()}")
    given, which = choose_weights(path, read_pickle(path), EMA_KEY, ema)
    report = [f"took the {which} weights of {path.name}"]
    weights: dict[str, Tensor] = {}
    dropped, unknown = [], []
    for key, value in given.items():
        # Only FLatten's PVT has this norm; its authors' network never applies it.
        unused = key in _UNUSED and model_name.startswith("flatten_pvt_") and variant.host is Pvt
        name = rename(variant.host, key)
        if unused:
            report.append(f"dropped {key}: an unused parameter, applied nowhere")
        elif key.endswith(_REBUILT):
            dropped.append(key)
        elif name is None:
            unknown.append(key)
        else:
            weights[name] = value.float()
    if dropped:
        report.append(f"dropped {len(dropped)} index tables and masks, rebuilt from the sizes")
    registered: Any = timm.get_pretrained_cfg(model_name)
    arguments: dict[str, Any] = {"img_size": input_size or registered.input_size[-1]}
    if window_size:
        arguments["window_size"] = window_size
    weights, resized = _fit(path, model_name, arguments, weights, unknown)
    return ReleasedFamily(model_name, weights, arguments, which, (*report, *resized))


def _known() -> str:
    return ", ".join(VARIANTS)


def _fit(
    path: Path,
    model_name: str,
    arguments: dict[str, Any],
    weights: dict[str, Tensor],
    unknown: list[str],
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights resized to the model's tables, after checking that all the rest fits exactly."""
    head = timm.get_pretrained_cfg_value(model_name, "classifier")
    rows = weights.get(f"{head}.weight")
    classes = 1000 if rows is None else rows.shape[0]
    try:
        with torch.device("meta"):
            model = timm.create_model(model_name, num_classes=classes, **arguments)
        target = model.state_dict()
        weights, lines = resize_tables(weights, target)
    except ValueError as error:
        raise UserError(f"{path}: {model_name} cannot be built so: {error}") from error
    require_fit(path, model_name, weights, target, unknown)
    return weights, lines
