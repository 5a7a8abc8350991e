"""Read a file of weights whatever its format; nothing in it can run code."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from l2vit.errors import UserError

_RAW_KEYS = ("model", "state_dict")
_EMA_KEYS = ("model_ema", "state_dict_ema")
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
"""What DistributedDataParallel and torch.compile put before the names of tensors."""
_HEAD = 512
"""Bytes that tell what a file is."""


class _Settings:
    """Stands for a yacs CfgNode, which some files hold beside the weights; it is not needed."""

    def __new__(cls, *_: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]
        """The weights-only unpickler fills no mapping but its own three kinds."""
        return OrderedDict()


def read(path: Path) -> dict[str, Any]:
    """The content of a file of weights, by what its first bytes say, not its name.

    Returns:
        The tensors of a safetensors file by name, or the dict that ``torch.save`` wrote.

    Raises:
        UserError: no such file, or no weights: says what the file is instead.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except FileNotFoundError:
        raise UserError(f"checkpoint not found: {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _read_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_pickle(path)
    raise UserError(f"{path} {_described(head)}")


def _described(head: bytes) -> str:
    """What a file that holds no weights is, and what to do."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty: fetch it again"
    if text.startswith(b"version https://git-lfs."):
        return "is a git-lfs pointer, not the weights themselves: run 'git lfs pull' there"
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not weights: use the address of the file, not of a page about it"
    if text.startswith((b"<?xml", b"{", b"[")):
        return f"is text, not weights: {_beginning(head)}"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")) or (
        head[257:262] == b"ustar"
    ):
        return "is a compressed or tar archive: unpack it and give the file of weights inside"
    return f"is no safetensors file and none of torch.save: it begins with {_beginning(head)}"


def _beginning(head: bytes) -> str:
    return repr(head[:24])[1:]


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is a damaged safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    allowed = [argparse.Namespace, (_Settings, "yacs.config.CfgNode")]
    try:
        with (
            path.open("rb") as file,  # given a name, PyTorch 2.14 goes by how it ends
            warnings.catch_warnings(),
            torch.serialization.safe_globals(allowed),  # type: ignore[arg-type]
        ):
            warnings.simplefilter("ignore")  # of an unusual pickle protocol
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def _reason(error: Exception) -> str:
    """The unpickler's finding in our words, without torch's advice to trust the file."""
    text = str(error)
    wanted = re.search(r"GLOBAL (\S+)", text)
    if wanted:
        return (
            f"is a pickle that asks for {wanted[1]}, which weights do not need and which may run"
            " code: it was not loaded"
        )
    detail = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    detail = detail.partition(". ")[0]
    if not detail or "weights_only" in detail or "weights only" in detail.lower():
        detail = "torch cannot make sense of it"
    return f"cannot be read as a checkpoint: {detail}"


def choose(path: Path, content: Mapping[str, Any], ema: bool | None) -> tuple[dict[str, Any], str]:
    """The flat dict of tensors in a file, and "raw" or "ema".

    Args:
        path: for messages.
        content: weights under ``model`` or ``state_dict``, averaged ones under ``model_ema`` or
            ``state_dict_ema``, or itself weights.
        ema: True or False to choose; None takes the averaged weights where there are any.

    Raises:
        UserError: the wanted weights are not there; names what is.
    """
    ema_key = next((key for key in _EMA_KEYS if key in content), " or ".join(_EMA_KEYS))
    raw_key = next((key for key in _RAW_KEYS if key in content), "")
    averaged = content.get(ema_key)
    if ema and averaged is None:
        raise UserError(f"{path} holds no {ema_key}: leave the choice of EMA weights out")
    use_ema = averaged is not None if ema is None else ema
    if not use_ema and averaged is not None and not raw_key:
        raise UserError(f"{path} holds no {_RAW_KEYS[0]}, only {ema_key}: ask for the EMA weights")
    chosen = averaged if use_ema else content[raw_key] if raw_key else content
    if not isinstance(chosen, Mapping) or not chosen:
        raise UserError(f"{path}: {ema_key if use_ema else raw_key} is no dict of weights")
    weights = {_WRAPPERS.sub("", str(key)): value for key, value in chosen.items()}
    odd = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"{path} holds no weights ({odd[0]} is no tensor)")
    return weights, "ema" if use_ema else "raw"


def architecture(content: Mapping[str, Any]) -> str:
    """The model's name in a checkpoint of timm's train.py, without its tag; else ""."""
    name = content.get("arch")
    return name.rpartition("/")[2].partition(".")[0] if isinstance(name, str) else ""


def constructor_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's train.py was told with ``--model-kwargs``; else nothing."""
    given = getattr(content.get("args"), "model_kwargs", None)
    return dict(given) if isinstance(given, Mapping) else {}
