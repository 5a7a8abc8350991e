"""A step that the device decides about: not finite, it changes nothing, and the host never asks.

DeepSpeed reads the gradient's norm on the host to skip a step or to clip. Here the norm stays on
the device, and the fused AdamW is told by its ``found_inf`` to leave weights, moments and its
count of steps alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_EPSILON = 1e-6
"""Of DeepSpeed's clipping."""


def defer(zero: Any) -> DeferredStep | None:
    """Let the bf16 optimizer of ZeRO-1 or 2 decide on the device; None, and nothing done, where it
    cannot: another stage or precision, or an AdamW that is not fused.

    Args:
        zero: DeepSpeed's optimizer, its foreach forms in use.
    """
    if not all(group.get("fused") for group in zero.optimizer.param_groups):
        return None
    if type(zero).__name__ == "BF16_Optimizer":
        return _Whole(zero)
    if type(zero).__name__ == "DeepSpeedZeroOptimizer" and zero.dtype == torch.bfloat16:
        return _Partitioned(zero)
    return None


class DeferredStep:
    """What the host may know of the last step without waiting for it."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.skipped = torch.zeros((), device=zero.optimizer.param_groups[0]["params"][0].device)
        """Scalar fp32: 1 if the gradient was not finite, else 0."""

    def _judged(self, norm: Tensor) -> Tensor:
        """Tell AdamW whether ``norm`` is finite; the norm, inf where it is not."""
        self.skipped = (~torch.isfinite(norm)).float()
        self._zero.optimizer.found_inf = self.skipped
        return norm.nan_to_num(nan=float("inf"), posinf=float("inf"))


class _Whole(DeferredStep):
    """ZeRO-1: every rank has the whole gradient, in few flat tensors."""

    def __init__(self, zero: Any) -> None:
        super().__init__(zero)
        zero.step = self._step

    @torch.no_grad()
    def _step(self, closure: None = None) -> None:
        held = self._zero
        held.overflow = False
        flats = list(held.fp32_groups_gradients_flat)
        norms = torch.stack([torch.linalg.vector_norm(flat) for flat in flats])
        norm = held._global_grad_norm = self._judged(torch.linalg.vector_norm(norms))
        if held.clip_grad > 0:
            # ≥ 1 where nothing is to be clipped; of a norm that is not finite nothing is used
            torch._foreach_mul_(flats, (held.clip_grad / (norm + _EPSILON)).clamp(max=1))
        for master, gradient in zip(
            held.fp32_groups_flat_partition, held.fp32_groups_gradient_flat_partition, strict=True
        ):
            master.grad = gradient
        held.optimizer.step()
        held._lazy_init_hp_params_optimizer_state()
        held.update_lp_params()


class _Partitioned(DeferredStep):
    """ZeRO-2: every rank has the gradient of its part of the weights."""

    def __init__(self, zero: Any) -> None:
        super().__init__(zero)
        self._norm = zero.scaled_global_norm
        zero.check_grad_overflow = False
        zero.scaled_global_norm = lambda norm_type=2: self._judged(self._norm(norm_type))
        zero.unscale_and_clip_grads = self._clip

    @torch.no_grad()
    def _clip(self, gradients: list[Tensor], norm: Tensor) -> None:
        if self._zero.clip_grad > 0:
            over = (norm + _EPSILON) / self._zero.clip_grad
            torch._foreach_mul_(gradients, 1 / over.clamp(min=1))
