"""Files that the authors of L²ViT, FLatten and InLine released, read as weights in our names."""

from __future__ import annotations

import argparse
import difflib
import pickle
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from l2vit.errors import UserError
from l2vit.models.families.resize import resize_tables
from l2vit.models.families.variants import VARIANTS
from l2vit.models.registry import SIZES
from l2vit.models.released_keys import L2VIT, REBUILT, rename

_RAW_KEY = "model"
_EMA_KEYS = ("model_ema", "state_dict_ema")
_UNUSED = ("norm.weight", "norm.bias")
_SHOWN = 3


@dataclass(frozen=True)
class Released:
    """A released file in our names.

    Attributes:
        model: registry name.
        model_args: constructor arguments besides ``num_classes``: img_size and, where the file or
            the caller says it, window_size.
        weights: parameters and buffers by the model's names, fp32.
        which: raw or ema.
        report: what was taken, dropped, resized and assumed, one line each.
    """

    model: str
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    which: str
    report: tuple[str, ...]


def read_released(
    path: Path,
    model: str = "",
    *,
    ema: bool | None = None,
    input_size: int | None = None,
    window_size: int | None = None,
) -> Released:
    """Read a file released by the authors of a network; nothing in it can run code.

    Args:
        path: the pickle; its weights under ``model``, ``model_ema``, ``state_dict_ema`` or nothing.
        model: registry name; "" for an L²ViT file, whose shapes tell its size.
        ema: which weights, where there are both; None prefers the averaged ones.
        input_size: pixels, instead of the file's or the model's own; position tables are resized.
        window_size: likewise, of the softmax attention.

    Raises:
        UserError: an unknown model; not such a file; or unknown, missing or mis-shaped tensors,
            which it names.
    """
    if model and model not in VARIANTS and model not in SIZES:
        near = ", ".join(difflib.get_close_matches(model, [*VARIANTS, *SIZES])) or "no name"
        raise UserError(f"{path}: released files of {model!r} are not known; like it: {near}")
    content = _read_pickle(path)
    given, which = _choose_weights(path, content, ema)
    report = [f"took the {which} weights of {path.name}"]
    network = VARIANTS[model].backbone.__name__ if model in VARIANTS else L2VIT
    weights, unknown = _rename_all(network, model, given, report)
    if network == L2VIT:
        found = _recognise(path, weights)
        if model not in ("", found):
            raise UserError(f"{path} holds {found}, not {model}")
        model, report[0] = found, f"{report[0]} as {found}"
        arguments = _authors_sizes(path, content.get("args"), input_size, window_size, report)
    else:
        registered: Any = timm.get_pretrained_cfg(model)
        arguments = {"img_size": input_size or registered.input_size[-1]}
        if window_size:
            arguments["window_size"] = window_size
    weights = _fit(path, model, arguments, weights, unknown, report)
    return Released(model, arguments, weights, which, tuple(report))


def _rename_all(
    network: str, model: str, given: Mapping[str, Tensor], report: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights by our names in fp32, and keys that the network does not have."""
    weights: dict[str, Tensor] = {}
    rebuilt, unknown = 0, []
    for key, value in given.items():
        name = rename(network, key)
        # Only FLatten's PVT has this norm; its authors' network never applies it.
        if key in _UNUSED and network == "Pvt" and model.startswith("flatten_"):
            report.append(f"dropped {key}: an unused parameter, applied nowhere")
        elif key.endswith(REBUILT):
            rebuilt += 1
        elif name is None:
            unknown.append(key)
        else:
            weights[name] = value.float() if value.is_floating_point() else value
    if rebuilt:
        report.append(f"dropped {rebuilt} index tables and masks, rebuilt from the sizes")
    return weights, unknown


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


def _authors_sizes(
    path: Path,
    args: object,
    input_size: int | None,
    window_size: int | None,
    report: list[str],
) -> dict[str, Any]:
    """Input and window size of an L²ViT file: the caller's, else from the file's args, else as the
    paper pairs them (a window of 1/32 of the input), with a line for each assumption."""
    size = input_size or _number(args, "input_size", "img_size")
    if size is None:
        size = 224
        report.append(f"{path.name} does not say its input size: assumed {size}")
    window = window_size or _number(args, "window_size", "win_size")
    if window is None:
        window = max(size // 32, 1)
        report.append(f"{path.name} does not say its window size: assumed {window}")
    return {"img_size": size, "window_size": window}


def _number(args: object, *names: str) -> int | None:
    for name in names:
        value = getattr(args, name, None)
        if isinstance(value, list | tuple) and value:
            value = value[-1]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _fit(
    path: Path,
    model: str,
    arguments: dict[str, Any],
    weights: dict[str, Tensor],
    unknown: list[str],
    report: list[str],
) -> dict[str, Tensor]:
    """Weights resized to the model's tables, after checking that all the rest fits exactly."""
    rows = weights.get(f"{timm.get_pretrained_cfg_value(model, 'classifier')}.weight")
    # A headless L²ViT is made for features; a family's file without a head is refused below.
    classes = rows.shape[0] if rows is not None else 0 if model in SIZES else 1000
    try:
        with torch.device("meta"):
            target = timm.create_model(model, num_classes=classes, **arguments).state_dict()
        weights, resized = resize_tables(weights, target)
    except ValueError as error:
        raise UserError(f"{path}: {model} cannot be built so: {error}") from error
    require_fit(weights, target, where=str(path), model=model, unknown=unknown)
    report += resized
    return weights


def require_fit(
    weights: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    *,
    where: str,
    model: str,
    unknown: Collection[str] = (),
    skip: tuple[str, ...] = (),
) -> None:
    """Check that ``weights`` are exactly the tensors of ``target``.

    Args:
        weights, target: state dicts.
        where: the source of the weights, for the message.
        model: whose tensors ``target`` holds, for the message.
        unknown: more keys of the source, which have no name of ours.
        skip: beginnings of names that are left out on both sides.

    Raises:
        UserError: names the first missing, unknown and mis-shaped tensors.
    """
    given = [name for name in weights if not (skip and name.startswith(skip))]
    wanted = [name for name in target if not (skip and name.startswith(skip))]
    missing = [name for name in wanted if name not in weights]
    strange = [*unknown, *(name for name in given if name not in target)]
    shapes = [
        f"{name}: {_sides(weights[name])}, not {_sides(target[name])}"
        for name in wanted
        if name in weights and weights[name].shape != target[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)})"
        for names, what in ((missing, "missing"), (strange, "unknown"), (shapes, "of other shape"))
        if names
    ]
    if problems:
        raise UserError(f"{where} does not fit {model}: tensors {'; '.join(problems)}")


def _sides(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


class _Settings:
    """Stands for a yacs CfgNode, which some files hold beside the weights; it is not needed."""

    def __new__(cls, *_: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]
        """The weights-only unpickler fills no mapping but its own three kinds."""
        return OrderedDict()


def _read_pickle(path: Path) -> dict[str, Any]:
    """The pickled dict at ``path``; nothing in it can run code.

    Raises:
        UserError: no such file, no pickle of tensors, or a pickle that wants more than tensors.
    """
    allowed = [argparse.Namespace, (_Settings, "yacs.config.CfgNode")]
    try:
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint not found: {path}") from None
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def _reason(error: Exception) -> str:
    """The unpickler's finding in one line, without its advice to trust the file."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return lines[0].partition(" was not an allowed")[0] if lines else type(error).__name__


def _choose_weights(
    path: Path, content: Mapping[str, Any], ema: bool | None
) -> tuple[dict[str, Tensor], str]:
    """The flat dict of tensors in a file (a leading ``module.`` removed), and "raw" or "ema".

    Args:
        content: weights under ``model``, averaged ones under one of the two EMA
            keys, or itself weights.
        ema: True or False to choose; None takes the averaged weights where there are any.

    Raises:
        UserError: the wanted weights are not there; names what is.
    """
    ema_key = next((key for key in _EMA_KEYS if key in content), " or ".join(_EMA_KEYS))
    averaged = content.get(ema_key)
    if ema and averaged is None:
        raise UserError(f"{path} holds no {ema_key}: leave the choice of EMA weights out")
    use_ema = averaged is not None if ema is None else ema
    if not use_ema and averaged is not None and _RAW_KEY not in content:
        raise UserError(f"{path} holds no {_RAW_KEY}, only {ema_key}: ask for the EMA weights")
    chosen = averaged if use_ema else content.get(_RAW_KEY, content)
    if not isinstance(chosen, Mapping) or not chosen:
        raise UserError(f"{path}: {ema_key if use_ema else _RAW_KEY} is no dict of weights")
    weights = {str(key).removeprefix("module."): value for key, value in chosen.items()}
    odd = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"{path} holds no weights ({odd[0]} is no tensor)")
    return weights, "ema" if use_ema else "raw"
