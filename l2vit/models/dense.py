"""Linear layers on a CPU without the detours of the general one.

``torch.nn.functional.linear`` writes the bias into the output and then adds the product to it: one
more pass over memory. oneDNN adds the bias and, in inference, the GELU on the way out. It would add
a residual more slowly than a pass over the fresh output does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from l2vit.models.tracing import eager

PIECE_BYTES = 1 << 24
"""Intermediates of twice this size and more are made in pieces: they stay in cache, and below the
32 MB from which the C allocator returns memory to the system at once, whose fresh pages cost more
time than the product that fills them."""


class Linear(nn.Linear):
    """``nn.Linear`` (B, ..., in) to (B, ..., out) with the bias fused in on CPUs."""

    def forward(self, input: Tensor, add: Tensor | None = None) -> Tensor:
        """The layer's output, plus ``add`` (B, ..., out) if given."""
        same = add is None or add.dtype == input.dtype
        if same and fusible(input, self.weight, self.bias):
            call = _FusedBias.apply if torch.is_grad_enabled() else _with_residual
            return call(input, self.weight, self.bias, add)
        out = super().forward(input)
        return out if add is None else add + out

    def with_gelu(self, x: Tensor) -> Tensor:
        """GELU of the layer's output."""
        if torch.is_grad_enabled() or hooked(self) or not fusible(x, self.weight, self.bias):
            return F.gelu(self(x))
        return _pointwise(x, self.weight, self.bias, "gelu")


def hooked(module: nn.Module) -> bool:
    """Whether somebody hooked the module's calls (profilers, pruning, feature extraction): they
    must happen, and return the module's own output. Compilers take hooks as they are."""
    return not torch.compiler.is_compiling() and bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def plus(layer: nn.Module, x: Tensor, add: Tensor | None) -> Tensor:
    """``layer(x)``, plus ``add`` if given; the layer may be what somebody put in a Linear's place
    (LoRA, quantisation)."""
    if add is None:
        return layer(x)
    if isinstance(layer, Linear) and not hooked(layer):
        return layer(x, add)
    return add + layer(x)


def fusible(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's fused linear layer may run here, and not a compiler or another device."""
    return (
        bias is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and eager()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and (x.dtype != torch.bfloat16 or _onednn_has_bf16())
    )


@functools.cache
def _onednn_has_bf16() -> bool:
    """oneDNN refuses bf16 on CPUs without AVX-512; PyTorch's own layers do not."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, after: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], "none")


def _with_residual(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
    out = _pointwise(x, weight, bias, "none")
    return out if add is None else out.add_(add)


class _FusedBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _with_residual(x, weight, bias, add)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, need_add = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _input_gradient(grad, weight) if need_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            rows.sum(0) if need_bias else None,
            grad if need_add else None,
        )


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad @ weight``; oneDNN's fp32 product, which has no derivative, beats the general one."""
    if grad.dtype == torch.float32 and not torch.is_grad_enabled():
        return _pointwise(grad, weight.t(), None, "none")
    return grad @ weight


def pieces(x: Tensor, width: int) -> int:
    """In how many row blocks to take ``x`` (..., C) when ``width`` values are made of each row."""
    if x.device.type != "cpu" or not eager():
        return 1
    size = x.numel() // x.shape[-1] * width * x.element_size()
    return 1 if size < 2 * PIECE_BYTES else -(-size // PIECE_BYTES)
