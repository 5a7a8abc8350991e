"""DeepSpeed's ZeRO-1 step with one operator for many weights, where its own takes one for each.

DeepSpeed casts, accumulates and measures the gradient of every weight tensor by itself: about
1,500 launches a step of l2vit_base. The same values go through foreach operators and through the
flat buffers that hold the gradients anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NEEDED = (
    "bf16_groups",
    "fp32_groups_gradients",
    "fp32_groups_gradients_flat",
    "fp32_groups_has_gradients",
    "get_grads_for_norm",
    "update_hp_grads",
)


def use_foreach(optimizer: Any) -> bool:
    """Make DeepSpeed's ``BF16_Optimizer`` work so; False, and nothing done, for any other."""
    if type(optimizer).__name__ != "BF16_Optimizer" or optimizer.has_moe_layers:
        return False
    if not all(hasattr(optimizer, name) for name in _NEEDED) or optimizer.immediate_grad_update:
        return False
    gradients = _Gradients(optimizer)
    optimizer.update_hp_grads = gradients.accumulate
    optimizer.get_grads_for_norm = gradients.flat
    return True


class _Gradients:
    """The gradients of one optimizer: as the backward pass made them, and in fp32."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @torch.no_grad()
    def accumulate(self, clear_lp_grads: bool = False) -> None:
        """Add the fresh gradients to the fp32 ones, which a step leaves at zero."""
        made, first, more = [], ([], []), ([], [])  # type: ignore[var-annotated]
        for weight, wide, seen in self._weights():
            if weight.grad is None:
                continue
            made.append(weight.grad)
            fresh, sums = more if seen else first
            fresh.append(weight.grad.reshape(wide.shape))
            sums.append(wide)
            weight._hp_grad = wide
        _copy(*first)
        if more[0]:
            cast = _like(more[1])
            _copy(more[0], cast)
            torch._foreach_add_(more[1], cast)
        if clear_lp_grads and made:
            torch._foreach_zero_(made)
        self._mark()

    def flat(self, for_clipping: bool = False) -> Any:
        """The fp32 gradients of all weights, padded with zeros, in as few tensors as there are."""
        found = list(self._optimizer.fp32_groups_gradients_flat)
        return found if for_clipping else (found, {})

    def _weights(self) -> list[tuple[Any, Tensor, bool]]:
        """Each weight, its fp32 gradient, and whether that holds an earlier micro-batch's."""
        held = self._optimizer
        return [
            one
            for group, wide, seen in zip(
                held.bf16_groups,
                held.fp32_groups_gradients,
                held.fp32_groups_has_gradients,
                strict=True,
            )
            for one in zip(group, wide, seen, strict=True)
        ]

    def _mark(self) -> None:
        held = self._optimizer
        for group, seen in zip(held.bf16_groups, held.fp32_groups_has_gradients, strict=True):
            for place, weight in enumerate(group):
                seen[place] = seen[place] or weight.grad is not None


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if sources:
        torch._foreach_copy_(targets, sources)


def _like(tensors: list[Tensor]) -> list[Tensor]:
    """Room for one more of each, as parts of one allocation."""
    sizes = [tensor.numel() for tensor in tensors]
    room = tensors[0].new_empty(sum(sizes))
    return [part.view_as(t) for part, t in zip(room.split(sizes), tensors, strict=True)]
