"""LayerNorm beside a residual connection: its gradient and the residual's in one pass.

``x`` goes on as it is and, normalised, into a branch. PyTorch computes LayerNorm's gradient, reads
it again and adds what came along the residual; it reads map and gradient once more for those of
weight and bias. Here a program takes rows in turn and does all of it. Its sums for weight and bias
are parts that a second step adds in a fixed order: no atomics, so a run repeats bit for bit. The
forward pass is PyTorch's. Everything is computed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2vit.models.ops import reference
from l2vit.models.ops.triton_sums import added_parts

_PROGRAMS = 1056  # eight on each multiprocessor of an H100
_ELEMENTS = 2048  # of a block: 16 a thread
_LARGEST = 4096  # channels
_CHECKED = ((3, 5, 96), (4300, 384))  # a block a program; several in turn


@triton.jit
def layer_norm_gradient_kernel(
    grad: tl.tensor,
    residual: tl.tensor,
    x: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    grad_x: tl.tensor,
    part: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Every num_programs-th block of rows. ``part`` is (programs, 2·C): weight's sums, bias's."""
    channel = tl.arange(0, BLOCK_C)
    exists = channel < channels
    scale = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    grad_bias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < rows
        valid = inside[:, None] & exists[None, :]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        center = tl.load(mean + row, mask=inside, other=0.0)[:, None]
        spread = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        given = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        normal = tl.where(valid, (value - center) * spread, 0.0)
        grad_weight += given * normal
        grad_bias += given
        given = given * scale
        along = tl.sum(given * normal, 1)[:, None] / channels
        level = tl.sum(given, 1)[:, None] / channels
        result = (given - level - normal * along) * spread
        if HAS_RESIDUAL:
            result += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=valid)
    into = part + tl.program_id(0) * 2 * channels + channel
    tl.store(into, tl.sum(grad_weight, 0), mask=exists)
    tl.store(into + channels, tl.sum(grad_bias, 0), mask=exists)


@torch.library.custom_op("l2vit::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad: Tensor,
    residual: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of LayerNorm over the last dimension, and of a residual beside it.

    Args:
        grad: of the normalised tensor.
        residual: of ``x`` as it went on; None where it did not.
        mean, rstd: of each row, in fp32, as ``torch.native_layer_norm`` gives them.

    Returns:
        Gradient of ``x``; that of weight and behind it bias, (2·C,) in the weight's precision.
    """
    x, grad = x.contiguous(), grad.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // channels
    width = triton.next_power_of_2(channels)
    height = max(1, _ELEMENTS // width)
    programs = min(_PROGRAMS, triton.cdiv(rows, height))
    grad_x = torch.empty_like(x)
    part = x.new_empty(programs, 2 * channels, dtype=torch.float32)
    with torch.cuda.device_of(x):  # where Triton launches
        layer_norm_gradient_kernel[(programs,)](
            grad,
            x if residual is None else residual.contiguous(),
            x,
            mean,
            rstd,
            weight.contiguous(),
            grad_x,
            part,
            rows,
            channels,
            HAS_RESIDUAL=residual is not None,
            BLOCK_M=height,
            BLOCK_C=width,
        )
    return grad_x, added_parts(part, weight.dtype, channels)


@layer_norm_backward.register_fake
def _(
    grad: Tensor,
    residual: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, weight.new_empty(2 * x.shape[-1])


class _ResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        normalized, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.set_materialize_grads(False)
        return x.view_as(x), normalized

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        residual, grad = grads
        if grad is None:
            return residual, None, None, None
        x, mean, rstd, weight = ctx.saved_tensors
        grad_x, sums = torch.ops.l2vit.layer_norm_backward(grad, residual, x, mean, rstd, weight)
        return grad_x, *sums.chunk(2), None


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are written for these."""
    return x.shape[-1] <= _LARGEST and x.dtype == weight.dtype


def residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    return _ResidualLayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]


def check(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a tiny input by the kernels and by PyTorch."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for shape in _CHECKED:
        inputs = [torch.randn(s, device=device, dtype=dtype) for s in (shape, *[shape[-1:]] * 2)]
        upstream = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
        for kept, form in zip(
            found, (residual_layer_norm, reference.residual_layer_norm), strict=True
        ):
            x, weight, bias = leaves = [t.detach().requires_grad_() for t in inputs]
            outputs = form(x, weight, bias, 1e-5)
            kept += [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    return found
