"""The second step of a sum that many programs make in parts: the parts added in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PARTS = 64  # that a program takes at a time
_BLOCK = 32


@triton.jit
def add_parts_kernel(
    part: tl.tensor,
    summed: tl.tensor,
    parts: tl.tensor,
    columns: tl.tensor,
    channels: tl.tensor,
    TAPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sums of the columns of ``part`` (parts, columns), rounded. Grid (column blocks).

    The columns are (TAPS, C), which are stored as (C, TAPS), and more that are stored as they are.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, parts, PARTS):
        row = first + tl.arange(0, PARTS)
        valid = (row < parts)[:, None] & (column < columns)[None, :]
        sums += tl.load(part + row[:, None] * columns + column[None, :], mask=valid, other=0.0)
    turned = (column % channels) * TAPS + column // channels
    place = tl.where(column < TAPS * channels, turned, column)
    tl.store(summed + place, tl.sum(sums, 0).to(summed.dtype.element_ty), mask=column < columns)


def added_parts(part: Tensor, dtype: torch.dtype, channels: int, taps: int = 1) -> Tensor:
    """Sums over (parts, width) in ``dtype``; the first taps·C of them, (taps, C), as (C, taps)."""
    parts, width = part.shape
    summed = part.new_empty(width, dtype=dtype)
    with torch.cuda.device_of(part):  # where Triton launches
        add_parts_kernel[(triton.cdiv(width, _BLOCK),)](
            part, summed, parts, width, channels, TAPS=taps, PARTS=_PARTS, BLOCK=_BLOCK
        )
    return summed
