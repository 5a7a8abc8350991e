"""Key maps between this package and the checkpoints that L²ViT's authors released."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from l2vit.errors import UserError
from l2vit.models.registry import SIZES
from l2vit.models.released import choose_weights, read_pickle, require_fit

EMA_KEY = "model_ema"
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
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
        (r"stages\.(\d)\.(\d+)\.((?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\..+)",
         r"stages.\1.blocks.\2.\3"),
        (r"norm\.(.+)", r"norm.\1"),
        (r"head\.(.+)", r"head.fc.\1"),
    )
]  # fmt: skip


@dataclass(frozen=True)
class AuthorsArgs:
    """What a released file says of its network beyond the shapes of its tensors.

    Attributes:
        window_size: of the window attention.
        input_size: pixels it was trained at.
        num_classes: rows of its head.
    """

    window_size: int
    input_size: int
    num_classes: int


@dataclass(frozen=True)
class Converted:
    """A released file in our names.

    Attributes:
        state_dict: parameters and buffers by the model's names, fp32.
        model_name: registry name, found from the shapes.
        args: constructor arguments of the model.
        which: raw or ema.
        report: what was taken and assumed, one line each.
    """

    state_dict: dict[str, Tensor]
    model_name: str
    args: AuthorsArgs
    which: str
    report: tuple[str, ...]


def rename(key: str) -> str | None:
    """Our name for a key of the authors; None for one their networks do not have."""
    for pattern, replacement in _RULES:
        match = pattern.fullmatch(key)
        if match is not None:
            return match.expand(replacement)
    return None


def filter_state_dict(state_dict: Mapping[str, Tensor], model: torch.nn.Module) -> dict[str, Any]:
    """For timm's loader: a state dict in our names, whichever of the two it comes in."""
    if not any(key.startswith("downsample_layers.") for key in state_dict):
        return dict(state_dict)
    return {rename(key) or key: value for key, value in state_dict.items()}


def convert_authors(
    path: Path,
    *,
    ema: bool | None = None,
    window_size: int | None = None,
    input_size: int | None = None,
) -> Converted:
    """Read a file released by L²ViT's authors; nothing in it can run code.

    Args:
        path: the pickle; its weights under ``model``, ``model_ema`` or nothing.
        ema: which weights, where there are both; None prefers the averaged ones.
        window_size, input_size: instead of what the file's ``args`` say.

    Raises:
        UserError: not such a file, or unknown, missing or mis-shaped tensors; names them.
    """
    content = read_pickle(path, argparse.Namespace)
    given, which = choose_weights(path, content, EMA_KEY, ema)
    weights: dict[str, Tensor] = {}
    unknown = []
    for key, value in given.items():
        name = rename(key)
        if name is None:
            unknown.append(key)
        else:
            weights[name] = value.float() if value.is_floating_point() else value
    model_name = _recognise(path, weights)
    args, assumed = _settings(path, content.get("args"), weights, window_size, input_size)
    with torch.device("meta"):
        target = timm.create_model(model_name, num_classes=args.num_classes).state_dict()
    require_fit(path, model_name, weights, target, unknown)
    report = (f"took the {which} weights of {path.name} as {model_name}", *assumed)
    return Converted(weights, model_name, args, which, report)


def _recognise(path: Path, weights: Mapping[str, Tensor]) -> str:
    """The registry name whose width and depths the tensors have."""
    width = weights.get("stem.norm.weight")
    found = re.compile(r"stages\.(\d)\.blocks\.(\d+)\.norm1\.weight")
    depths = [0] * 4
    for name in weights:
        match = found.fullmatch(name)
        if match and int(match[1]) < len(depths):
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    if width is None and not any(depths):
        raise UserError(
            f"{path} has no tensor named as in L²ViT's files; FLatten and InLine files need their"
            " network's name (--model of export_timm, --name of evaluate and look)"
        )
    size = {"embed_dim": 0 if width is None else width.shape[0], "depths": tuple(depths)}
    for model_name, known in SIZES.items():
        if known == size:
            return model_name
    raise UserError(
        f"{path} is no L²ViT of a known size: {size['embed_dim']} channels, depths {depths}"
    )


def _settings(
    path: Path,
    args: object,
    weights: Mapping[str, Tensor],
    window_size: int | None,
    input_size: int | None,
) -> tuple[AuthorsArgs, list[str]]:
    """Window and input size: as asked for, else from the file's args, else as the paper pairs
    them (a window of 1/32 of the input); and what had to be assumed."""
    assumed = []
    size = input_size or _number(args, "input_size", "img_size")
    if size is None:
        size = 224
        assumed.append(f"{path.name} does not say its input size: assumed {size}")
    window = window_size or _number(args, "window_size", "win_size")
    if window is None:
        window = max(size // 32, 1)
        assumed.append(f"{path.name} does not say its window size: assumed {window}")
    head = weights.get("head.fc.weight")
    return AuthorsArgs(window, size, 0 if head is None else head.shape[0]), assumed


def _number(args: object, *names: str) -> int | None:
    for name in names:
        value = getattr(args, name, None)
        if isinstance(value, list | tuple) and value:
            value = value[-1]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
