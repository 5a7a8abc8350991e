"""Layers that every network here is built of, on feature maps of shape (B, H, W, C).

A (B, H, W, C) tensor is the channels-last picture that convolutions like, the row-major matrix that
linear layers like and the layout LayerNorm likes: nothing is copied between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2vit.models import ops
from l2vit.models.ops.modes import has_open_sizes, statically_true
from l2vit.models.ops.recompute import recomputing

LOW_PRECISION = (torch.float16, torch.bfloat16)
MlpKind = Literal["plain", "pvt2", "local"]
Observer = Callable[[Tensor], None]
"""Is shown the unclamped fp32 denominators (B, heads, N, 1) of every forward pass."""


def require_one_of(name: str, value: str, kinds: Any) -> None:
    """Check an argument against the strings of a ``Literal`` type.

    Raises:
        ValueError: it is none of them; lists them.
    """
    if value not in get_args(kinds):
        raise ValueError(f"{name} {value!r} is none of {', '.join(get_args(kinds))}")


def to_nchw(x: Tensor) -> Tensor:
    """(B, H, W, C) seen as (B, C, H, W) in channels-last memory, without a copy."""
    return x.permute(0, 3, 1, 2)


def to_nhwc(x: Tensor) -> Tensor:
    """(B, C, H, W) seen as (B, H, W, C); contiguous if ``x`` is channels-last."""
    return x.permute(0, 2, 3, 1)


def unobserved(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is a ``kind`` as it was made, with no hook that waits for its call: then
    its weights may be used without calling it, and no tool misses anything."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _global_hooks()
    )


def _global_hooks() -> bool:
    hooks = nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def normalized_beside(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``x`` for the residual connection, and ``norm(x)`` for the branch that is added to it."""
    if (
        isinstance(norm, nn.LayerNorm)
        and norm.bias is not None
        and ops.fuses_residual_norm(x)
        and unobserved(norm, nn.LayerNorm)
    ):
        return ops.residual_layer_norm(x, norm.weight, norm.bias, norm.eps)
    return x, norm(x)


class DepthwiseConv(nn.Conv2d):
    """Depthwise k×k convolution, stride 1, same padding, with bias; (B, C, H, W) to the same."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        return ops.depthwise_conv(input, self.weight, self.bias)


class Mlp(nn.Module):
    """Linear, GELU, linear on the last dimension; the other kinds need (B, H, W, C).

    Args:
        dim: channels in and out.
        hidden: channels between the two linear layers.
        kind: plain; pvt2 puts a depthwise 3×3 conv before the GELU (Fig. 4 middle); local has
            BatchNorm and GELU after the first linear layer and again after the conv (Fig. 4 right).
    """

    def __init__(self, dim: int, hidden: int, kind: MlpKind = "plain") -> None:
        super().__init__()
        require_one_of("mlp", kind, MlpKind)
        self.fc1 = nn.Linear(dim, hidden)
        self.norm1 = BatchNorm2d(hidden) if kind == "local" else None
        self.conv = DepthwiseConv(hidden, 3) if kind != "plain" else None
        self.norm2 = BatchNorm2d(hidden) if kind == "local" else None
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.norm1 is not None:
            x = F.gelu(to_nhwc(self.norm1(to_nchw(x))))
        if self.conv is not None:
            x = to_nhwc(self.conv(to_nchw(x)))
        if self.norm2 is not None:
            x = to_nhwc(self.norm2(to_nchw(x)))
        return self.fc2(F.gelu(x))


def shortfall(size: int, multiple: int) -> int:
    """What ``size`` lacks to a multiple; a form that sympy, unlike the remainder, sees through."""
    return (size + multiple - 1) // multiple * multiple - size


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad (B, H, W, C) on the bottom and right until H and W are multiples."""
    bottom, right = shortfall(x.shape[1], multiple), shortfall(x.shape[2], multiple)
    if statically_true(bottom == 0) and statically_true(right == 0):
        return x
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The top left (B, height, width, C) of ``x`` (B, H, W, C), contiguous."""
    if statically_true(x.shape[1] == height) and statically_true(x.shape[2] == width):
        return x
    if has_open_sizes(height, width):  # a slice's end asks whether it lies inside
        rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
        return x.index_select(1, rows).index_select(2, columns)
    return x[:, :height, :width].contiguous()


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that computes in, and keeps its running statistics in, fp32.

    Works whatever the precision of its weights and input (bf16 parameters under DeepSpeed, fp16,
    ``model.bfloat16()``); float64 stays float64. Input and output (B, C, H, W). Recomputing a block
    in the backward pass leaves the running statistics as they are.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self._widen()  # the default type may be half precision

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen()  # assigned tensors come as they are

    def _widen(self) -> None:
        for name in ("running_mean", "running_var"):
            value = getattr(self, name)
            if value is not None and value.dtype in LOW_PRECISION:
                setattr(self, name, value.float())

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        half = input.dtype in LOW_PRECISION or self.weight.dtype in LOW_PRECISION
        use_batch = self.training or not self.track_running_stats
        update, momentum = self.count_batch()
        # The kernels take a half-precision input beside fp32 statistics and weights as it is.
        return F.batch_norm(
            input,
            *self._statistics(update or not use_batch),
            self.weight.float() if half else self.weight,
            self.bias.float() if half else self.bias,
            use_batch,
            momentum,
            self.eps,
        )

    def count_batch(self) -> tuple[bool, float]:
        """Whether a pass counts in the running statistics, and the weight of its batch there."""
        update = self.training and self.track_running_stats and not recomputing()
        momentum = 0.0 if self.momentum is None else self.momentum
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return update, momentum

    def _statistics(self, own: bool) -> tuple[Tensor | None, Tensor | None]:
        """The running mean and variance; copies when they must stay as they are.

        Not None: the kernel would then save fewer tensors, and recomputing a block refuses that.
        """
        if own or self.running_mean is None or self.running_var is None:
            return self.running_mean, self.running_var
        return self.running_mean.clone(), self.running_var.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm2d:
        before = (self.running_mean, self.running_var)
        super()._apply(fn, recurse)
        for name, old in zip(("running_mean", "running_var"), before, strict=True):
            new = getattr(self, name)
            if old is not None and new is not None and new.dtype in LOW_PRECISION:
                setattr(self, name, old.detach().to(new.device, torch.float32))
        return self
