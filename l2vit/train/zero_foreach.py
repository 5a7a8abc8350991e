"""DeepSpeed's ZeRO-1 and 2 with one operator for many weights, where its own takes one for each.

DeepSpeed casts, accumulates and measures the gradient of every weight tensor by itself: about
1,500 launches a step of l2vit_base at ZeRO-1, 7,500 at ZeRO-2. The same values go through foreach
operators and through the flat buffers that hold the gradients anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Place = tuple[int, int]
"""Of a weight: its group and its number there."""
_NEEDED_1 = (
    "bf16_groups",
    "clear_hp_grads",
    "clear_lp_grads",
    "fp32_groups_gradients",
    "fp32_groups_gradients_flat",
    "fp32_groups_has_gradients",
    "get_grads_for_norm",
    "update_hp_grads",
)


_NEEDED_2 = (
    "_add_full_reduction_to_compact_grad_partition",
    "_get_compact_grad_partition_buffer",
    "_update_model_bit16_weights",
    "_use_compact_grad_partition_buffer",
    "averaged_gradients",
    "bit16_groups_flat",
    "dp_process_group",
    "grad_partition_insertion_offset",
    "grad_start_offset",
    "has_overflow_partitioned_grads_serial",
    "ipg_buckets",
    "partition_size",
    "real_dp_process_group",
    "scaled_global_norm",
)


def use_foreach(optimizer: Any) -> Gradients | Partition | None:
    """Make DeepSpeed's optimizer of ZeRO-1 (``BF16_Optimizer``) or ZeRO-2 (and ZeRO-1 in fp32 and
    fp16; ``DeepSpeedZeroOptimizer``) work so; None, and nothing done, for any other."""
    name = type(optimizer).__name__
    if name == "BF16_Optimizer" and _has(optimizer, _NEEDED_1):
        if optimizer.immediate_grad_update:
            return None
        gradients = Gradients(optimizer)
        optimizer.update_hp_grads = gradients.accumulate
        optimizer.get_grads_for_norm = gradients.flat
        optimizer.clear_hp_grads = gradients.forget
        # A weight's gradient is then kept as the backward pass makes it, not added to zeros.
        optimizer.backward_prologue = partial(optimizer.clear_lp_grads, set_to_none=True)
        return gradients
    if name == "DeepSpeedZeroOptimizer" and _has(optimizer, _NEEDED_2):
        if optimizer.cpu_offload:
            return None
        partition = Partition(optimizer)
        optimizer._add_full_reduction_to_compact_grad_partition = partition.add
        optimizer.has_overflow_partitioned_grads_serial = partition.not_finite
        optimizer.scaled_global_norm = partition.norm
        # Weights are views of the flat tensor that ranks gather: nothing is left to be set.
        optimizer._update_model_bit16_weights = lambda group: None
        return partition
    return None


def _has(optimizer: Any, names: tuple[str, ...]) -> bool:
    return not optimizer.has_moe_layers and all(hasattr(optimizer, name) for name in names)


class Partition:
    """This rank's part of the gradients at ZeRO-2."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._square: Tensor | None = None
        """Of the norm of this rank's gradients; kept from the check for the norm."""

    @torch.no_grad()
    def add(self, reduced: Tensor, communication_dtype: torch.dtype) -> None:
        """Add a bucket of gradients, summed over the ranks, to what is kept of them here."""
        held, offset = self._optimizer, 0
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        for group, place, parameter in held.ipg_buckets[communication_dtype].params:
            numel = held.bit16_groups[group][place].numel()
            rank = dist.get_rank(group=held.real_dp_process_group[group])
            starts = held.grad_start_offset[group][rank]
            if parameter in starts and held._use_compact_grad_partition_buffer(group):
                into = int(held.grad_partition_insertion_offset[group][rank][parameter])
                start = int(starts[parameter])
                count = int(min(numel - start, held.partition_size[group] - into))
                if count > 0:
                    flat = held._get_compact_grad_partition_buffer(group).flat_partition
                    sources.append(reduced.narrow(0, offset + start, count))
                    targets.append(flat.narrow(0, into, count))
            offset += numel
        if targets:
            torch._foreach_add_(targets, sources)

    @torch.no_grad()
    def not_finite(self) -> Tensor:
        """Whether a gradient kept here is infinite or no number."""
        self._square = self._measured()
        return ~torch.isfinite(self._square).reshape(1)

    @torch.no_grad()
    def norm(self, norm_type: int = 2) -> Tensor:
        """L2 norm over all ranks."""
        square, self._square = self._square, None
        if square is None:
            square = self._measured()
        dist.all_reduce(square, group=self._optimizer.dp_process_group)
        return square.sqrt().float()

    def _measured(self) -> Tensor:
        norms = torch._foreach_norm(self._tensors(), 2, torch.float64)
        return torch.stack(list(norms)).square().sum()

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for kept in self._optimizer.averaged_gradients.values():
            flat = getattr(kept, "flat_partition", None)
            found += [flat] if flat is not None else [g for g in kept or [] if g is not None]
        return found


class Gradients:
    """The gradients of ZeRO-1's optimizer: as the backward pass made them, and in fp32."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        groups = optimizer.bf16_groups
        self.weights = {
            (group, number): weight
            for group, weights in enumerate(groups)
            for number, weight in enumerate(weights)
        }
        self._added: set[Place] = set()
        """Weights whose fresh gradient is in the fp32 one already."""

    def accumulate(self, clear_lp_grads: bool = False) -> None:
        """Add the fresh gradients to the fp32 ones; the first after a step takes their place."""
        self.add([place for place in self.weights if place not in self._added])
        self._added.clear()
        made = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        if clear_lp_grads and made:
            torch._foreach_zero_(made)

    @torch.no_grad()
    def add(self, places: list[Place]) -> None:
        """Do so for some weights, which ``accumulate`` then leaves out."""
        first, more = ([], []), ([], [])  # type: ignore[var-annotated]
        seen = self._optimizer.fp32_groups_has_gradients
        for group, number in places:
            weight = self.weights[group, number]
            if weight.grad is None:
                continue
            wide = self._optimizer.fp32_groups_gradients[group][number]
            fresh, sums = more if seen[group][number] else first
            fresh.append(weight.grad.reshape(wide.shape))
            sums.append(wide)
            weight._hp_grad = wide
            seen[group][number] = True
        _copy(*first)
        if more[0]:
            cast = _like(more[1])
            _copy(more[0], cast)
            torch._foreach_add_(more[1], cast)
        self._added.update(places)

    @torch.no_grad()
    def settle(self, places: list[Place]) -> None:
        """Of weights that got no gradient since the last step, make the fp32 one zero."""
        held = self._optimizer
        absent = [
            held.fp32_groups_gradients[group][number]
            for group, number in places
            if not held.fp32_groups_has_gradients[group][number]
        ]
        if absent:
            torch._foreach_zero_(absent)

    def forget(self) -> None:
        """Begin a step's gradients anew; nothing is written until they come, or ``settle``."""
        for seen in self._optimizer.fp32_groups_has_gradients:
            seen[:] = [False] * len(seen)

    def flat(self, for_clipping: bool = False) -> Any:
        """The fp32 gradients of all weights, padded with zeros, in as few tensors as there are."""
        found = list(self._optimizer.fp32_groups_gradients_flat)
        return found if for_clipping else (found, {})


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if sources:
        torch._foreach_copy_(targets, sources)


def _like(tensors: list[Tensor]) -> list[Tensor]:
    """Room for one more of each, as parts of one allocation."""
    sizes = [tensor.numel() for tensor in tensors]
    room = tensors[0].new_empty(sum(sizes))
    return [part.view_as(t) for part, t in zip(room.split(sizes), tensors, strict=True)]
