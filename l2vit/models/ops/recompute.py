"""Recomputing a module in the backward pass instead of keeping its activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_recomputing = False


def recomputing() -> bool:
    """True in the second forward pass of a module, which must not count in running statistics."""
    return _recomputing


def recompute(module: nn.Module, *inputs: Any) -> Tensor:
    """``module(*inputs)``; in training its activations are computed again in the backward pass."""
    if not (module.training and torch.is_grad_enabled()):
        return module(*inputs)
    if torch.compiler.is_compiling():
        # Compilers take no contexts, and write a buffer once however often they compute its value.
        return checkpoint(module, *inputs, use_reentrant=False)
    return checkpoint(module, *inputs, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[Any, Any]:
    return contextlib.nullcontext(), _second_forward()


@contextlib.contextmanager
def _second_forward() -> Iterator[None]:
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        yield
    finally:
        _recomputing = before
