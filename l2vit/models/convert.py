"""Single files of weights, read in our names: released by the authors of L²ViT, FLatten and InLine,
saved by timm's train.py, or the ``model.safetensors`` of any timm model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from l2vit.errors import UserError
from l2vit.models import weight_files
from l2vit.models.families.resize import resize_tables
from l2vit.models.families.variants import VARIANTS
from l2vit.models.registry import SIZES
from l2vit.models.released_keys import L2VIT, REBUILT, rename

_UNUSED = ("norm.weight", "norm.bias")
_SHOWN = 3


@dataclass(frozen=True)
class Released:
    """A file of weights in our names.

    Attributes:
        model: registry name.
        model_args: constructor arguments besides ``num_classes``: img_size and, where the file or
            the caller says it, window_size.
        input_size: pixels.
        weights: parameters and buffers by the model's names, fp32.
        which: raw or ema.
        report: what was taken, dropped, resized and assumed, one line each.
    """

    model: str
    model_args: dict[str, Any]
    input_size: int
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
    """Read one file of weights; nothing in it can run code.

    Args:
        path: safetensors, or a pickle with its weights under ``model``, ``state_dict``,
            ``model_ema``, ``state_dict_ema`` or nothing; names of tensors as the authors released
            them, or timm's.
        model: registry name; "" for an L²ViT file, whose shapes tell its size, and for
            checkpoints of timm's train.py, which say it.
        ema: which weights, where there are both; None prefers the averaged ones.
        input_size: pixels, instead of the file's or the model's own; position tables are resized.
        window_size: likewise, of the softmax attention.

    Raises:
        UserError: an unknown model; no file of weights; or unknown, missing or mis-shaped tensors,
            which it names.
    """
    _require_known(path, model)
    content = weight_files.read(path)
    given, which = weight_files.choose(path, content, ema)
    model = _named(path, model, weight_files.architecture(content))
    report = [f"took the {which} weights of {path.name}"]
    weights, unknown = _in_our_names(model, given, report)
    if not model:
        model = _recognise(path, weights)
        report[0] += f" as {model}"
    elif model in SIZES and (found := _recognise(path, weights)) != model:
        raise UserError(f"{path} holds {found}, not {model}")
    arguments, size = _sizes(path, model, content, input_size, window_size, report)
    weights = _fit(path, model, arguments, weights, unknown, report)
    return Released(model, arguments, size, weights, which, tuple(report))


def _sizes(
    path: Path,
    model: str,
    content: Mapping[str, Any],
    input_size: int | None,
    window_size: int | None,
    report: list[str],
) -> tuple[dict[str, Any], int]:
    """Constructor arguments and input size: the caller's, else the file's, else the model's."""
    arguments, args = weight_files.constructor_arguments(content), content.get("args")
    registered: Any = timm.get_pretrained_cfg(model)
    recorded = _number(args, "input_size", "img_size")
    if model in SIZES:
        size = input_size or recorded
        size, window = _authors_sizes(path, args, size, window_size, report)
        return arguments | {"img_size": size, "window_size": window}, size
    if model in VARIANTS:
        size = input_size or int(registered.input_size[-1])
        window_of = {"window_size": window_size} if window_size else {}
        return arguments | {"img_size": size} | window_of, size
    size = input_size or recorded or int(registered.input_size[-1])
    return arguments | ({"img_size": size} if _takes_size(model, size) else {}), size


def _named(path: Path, asked: str, recorded: str) -> str:
    """The model a file is to be read as: what was asked for, else what the file says."""
    if not timm.is_model(recorded):
        return asked
    if asked and recorded.removesuffix("_384") != asked.removesuffix("_384"):
        raise UserError(f"{path} holds {recorded}, not {asked}")
    return asked or recorded


def _require_known(path: Path, model: str) -> None:
    if model and not timm.is_model(model):
        near = ", ".join(difflib.get_close_matches(model, timm.list_models())) or "no name"
        raise UserError(f"{path}: timm knows no model {model!r}; like it: {near}")


def _takes_size(model: str, size: int) -> bool:
    try:
        with torch.device("meta"):
            timm.create_model(model, img_size=size)
    except TypeError:
        return False
    return True


def _in_our_names(
    model: str, given: Mapping[str, Tensor], report: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights by the model's names in fp32, and keys that it does not have."""
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    notes: list[str] = []
    if not model or model in SIZES or model in VARIANTS:
        network = VARIANTS[model].backbone.__name__ if model in VARIANTS else L2VIT
        renamed, unknown = _rename_all(network, model, given, notes)
        with torch.device("meta"):
            names = set(timm.create_model(model or "l2vit_tiny").state_dict())
        if len(names & renamed.keys()) > len(names & given.keys()):
            report += notes
            return renamed, unknown
    return {name: _fp32(value) for name, value in given.items()}, []


def _fp32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


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
            weights[name] = _fp32(value)
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
            f"{path} has no tensor named as in L²ViT's files; other files need their network's"
            " name (--model of export, --name of evaluate and look, model.name of a run)"
        )
    size = {"embed_dim": 0 if width is None else width.shape[0], "depths": tuple(depths)}
    for model_name, known in SIZES.items():
        if known == size:
            return model_name
    raise UserError(
        f"{path} is no L²ViT of a known size: {size['embed_dim']} channels, depths {depths}"
    )


def _authors_sizes(
    path: Path, args: object, size: int | None, window_size: int | None, report: list[str]
) -> tuple[int, int]:
    """Input and window size of an L²ViT file: the caller's, else from the file's args, else as the
    paper pairs them (a window of 1/32 of the input), with a line for each assumption."""
    if size is None:
        size = 224
        report.append(f"{path.name} does not say its input size: assumed {size}")
    window = window_size or _number(args, "window_size", "win_size")
    if window is None:
        window = max(size // 32, 1)
        report.append(f"{path.name} does not say its window size: assumed {window}")
    return size, window


def _number(args: object, *names: str) -> int | None:
    for name in names:
        value = getattr(args, name, None) or _keyword(args, name)
        if isinstance(value, list | tuple) and value:
            value = value[-1]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _keyword(args: object, name: str) -> object:
    keywords = getattr(args, "model_kwargs", None)
    return keywords.get(name) if isinstance(keywords, Mapping) else None


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
    # A headless L²ViT is made for features; other files without a head are refused below.
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
