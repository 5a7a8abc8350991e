"""Parameters and multiply-adds, counted one way for every model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Learned parameters; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def shapes_only(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the meta device, in fp32: shapes without memory or arithmetic."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, dtype=dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def count_macs(
    model: nn.Module,
    input_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    *,
    norms: bool = False,
) -> float:
    """Multiply-adds of one image: matrix products and convolutions.

    Runs on the meta device: no memory, no arithmetic. The model itself is left as it was.

    Args:
        model: takes images (1, in_chans, H, W).
        input_size: H and W, or (H, W).
        norms: add normalisation as the paper's tables do (and fvcore): 5 for each value through a
            LayerNorm, 2 for each through a BatchNorm.
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    twin = shapes_only(model).eval()
    image = torch.empty(1, in_chans, height, width, device="meta")
    counter = FlopCounterMode(display=False)
    extra = 0

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal extra
        extra += inputs[0].numel() * (5 if isinstance(module, nn.LayerNorm) else 2)

    if norms:
        for module in twin.modules():
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                module.register_forward_pre_hook(add)
    # Fused attention kernels are opaque to the counter; the plain form does the same products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        twin(image)
    return counter.get_total_flops() / 2 + extra
