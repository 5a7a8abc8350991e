"""What stays fp32 in a network whose parameters are cast, so that any timm model trains.

Parameters are cast to the compute type whole. BatchNorm's running statistics stay fp32: in bf16
they would not move. PyTorch's BatchNorm refuses bf16 weights beside fp32 statistics, though not
beside a bf16 input, so it is given its weights in fp32. Tables and masks that a module makes from
sizes take the compute type, or they would widen what they are added to. Modules of this project
see to all this themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def widen_norms(network: nn.Module) -> None:
    """Let norms that keep running statistics compute with fp32 weights, whatever theirs are."""
    for module in network.modules():
        if isinstance(module, _NormBase) and not _ours(module):
            module.forward = _with_wide_weights(module, module.forward)


def _with_wide_weights(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def wide(*inputs: Any, **options: Any) -> Any:
        held = {name: p for name, p in module._parameters.items() if p is not None}
        try:
            for name, parameter in held.items():
                module._parameters[name] = parameter.float()  # type: ignore[assignment]
            return forward(*inputs, **options)
        finally:
            module._parameters.update(held)

    return wide


def buffers_of(network: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Copies of all buffers in the type they keep while parameters are ``dtype``."""
    kept = network.state_dict(keep_vars=True)
    found = {}
    for path, module in network.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            made = name not in kept and buffer.is_floating_point() and not _ours(module)
            found[name] = buffer.detach().to(dtype if made else buffer.dtype, copy=True)
    return found


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast ``network`` in place as the engine does."""
    buffers = buffers_of(network, dtype)
    widen_norms(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in network.named_buffers():
        buffer.data = buffers[name]


def _ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("l2vit.")
