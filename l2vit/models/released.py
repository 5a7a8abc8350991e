"""What reading any authors' checkpoint has in common: unpickling, choosing weights, fitting."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2vit.errors import UserError

RAW_KEY = "model"
_SHOWN = 3


class _Settings:
    """Stands for a yacs CfgNode, which some files hold beside the weights and nobody here needs."""

    def __new__(cls, *_: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]
        """The weights-only unpickler fills no mapping but its own three kinds."""
        return OrderedDict()


def read_pickle(path: Path, *classes: type) -> dict[str, Any]:
    """The pickled dict at ``path``; nothing in it can run code.

    Args:
        classes: harmless classes the file may hold beside tensors and plain values.

    Raises:
        UserError: no such file, no pickle of tensors, or a pickle that wants more than tensors.
    """
    allowed = [*classes, (_Settings, "yacs.config.CfgNode")]
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


def choose_weights(
    path: Path, content: Mapping[str, Any], ema_key: str, ema: bool | None
) -> tuple[dict[str, Tensor], str]:
    """The flat dict of tensors in a file (a leading ``module.`` removed), and "raw" or "ema".

    Args:
        content: weights under ``model``, averaged ones under ``ema_key``, or itself the weights.
        ema: True or False to choose; None takes the averaged weights where there are any.

    Raises:
        UserError: the wanted weights are not there; names what is.
    """
    averaged = content.get(ema_key)
    if ema and averaged is None:
        raise UserError(f"{path} holds no {ema_key}: leave the choice of EMA weights out")
    use_ema = averaged is not None if ema is None else ema
    if not use_ema and averaged is not None and RAW_KEY not in content:
        raise UserError(f"{path} holds no {RAW_KEY}, only {ema_key}: ask for the EMA weights")
    chosen = averaged if use_ema else content.get(RAW_KEY, content)
    if not isinstance(chosen, Mapping) or not chosen:
        raise UserError(f"{path}: {ema_key if use_ema else RAW_KEY} is no dict of weights")
    weights = {str(key).removeprefix("module."): value for key, value in chosen.items()}
    odd = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"{path} holds no weights ({odd[0]} is no tensor)")
    return weights, "ema" if use_ema else "raw"


def require_fit(
    path: Path,
    model_name: str,
    weights: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    unknown: list[str],
) -> None:
    """Check that ``weights`` are exactly the tensors of ``target``.

    Args:
        unknown: keys of the file that no rule renames, refused likewise.

    Raises:
        UserError: names the first missing, unknown and mis-shaped tensors.
    """
    unknown = unknown + [name for name in weights if name not in target]
    missing = [name for name in target if name not in weights]
    shapes = [
        f"{n}: {_sides(weights[n])}, not {_sides(target[n])}"
        for n in target
        if n in weights and weights[n].shape != target[n].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)})"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of other shape"))
        if names
    ]
    if problems:
        raise UserError(f"{path} does not fit {model_name}: tensors {'; '.join(problems)}")


def _sides(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
