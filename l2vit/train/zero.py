"""Where each parameter's fp32 master and moments lie in this rank's ZeRO partition.

ZeRO flattens parameters and gives every rank a part of the flat tensor, so a rank owns at most
one contiguous run of each parameter's elements: a *shard*. Everything that must not know of
stages or ranks (checkpoints, initial weights, the moving average) goes through shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MOMENTS = {"moment1": "exp_avg", "moment2": "exp_avg_sq"}
"""Our names of AdamW's states."""

Reader = Callable[[str, int, int], torch.Tensor]
"""(tensor key, first element, elements) -> 1-D tensor of that run of the flattened tensor."""


@dataclass(frozen=True)
class ZeroShard:
    """A run of one parameter's elements owned by this rank."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the run in the flattened parameter."""
    numel: int
    flat: int
    """Which of the partition's flat fp32 tensors holds the run."""
    offset: int
    """Where the run starts in it."""

    def of(self, flats: list[torch.Tensor]) -> torch.Tensor:
        """The run's elements: a view of one of ``flats``."""
        return flats[self.flat].detach().narrow(0, self.offset, self.numel)


def flat_masters(zero: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors this rank's optimizer steps, in the order shards count them."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3 empties its param_groups
        return list(zero.fp32_partitioned_groups_flat)
    return [tensor for group in zero.optimizer.param_groups for tensor in group["params"]]


def own_shards(model: nn.Module, zero: Any, rank: int) -> list[ZeroShard]:
    """This rank's shards of the trainable parameters of ``model``.

    Args:
        model: the module DeepSpeed wraps.
        zero: its ZeRO optimizer, of any stage.
        rank: this rank.
    """
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        place = _stage3(parameter, zero, rank) if is_stage3(parameter) else _stage12(parameter)
        if place is not None:
            start, numel, flat, offset = place
            found.append(ZeroShard(name, full_shape(parameter), start, numel, flat, offset))
    return found


def is_stage3(parameter: nn.Parameter) -> bool:
    """Whether the parameter itself is partitioned."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the whole parameter, partitioned or not."""
    return tuple(parameter.ds_shape if is_stage3(parameter) else parameter.shape)


def _stage12(parameter: Any) -> tuple[int, int, int, int] | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # lies wholly in other ranks' partitions
        return None
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return low.start, low.numel, mapping.param_group_index, high.start


def _stage3(parameter: Any, zero: Any, rank: int) -> tuple[int, int, int, int] | None:
    flat, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
    start = rank * numel  # equal shares, the last ones padded
    numel = min(numel, parameter.ds_numel - start)
    return (start, numel, flat, offset) if numel > 0 else None


def moments(optimizer: torch.optim.Optimizer, flats: list[torch.Tensor]) -> Iterator[Any]:
    """AdamW's state of each flat tensor, made now if the optimizer has not stepped yet.

    Made ahead of the first step, so that memory runs out at the start or never, and so that a
    checkpoint has somewhere to be read into.
    """
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for flat in flats:
        state = optimizer.state[flat]
        if not state:
            device = flat.device if fused else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for key in MOMENTS.values():
                state[key] = torch.zeros_like(flat, requires_grad=False)
        yield state
