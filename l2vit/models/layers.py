"""The parts of L²ViT (and of the hosts beside it), on feature maps of shape (B, H, W, C).

A (B, H, W, C) tensor is the channels-last picture that convolutions like, the row-major matrix that
linear layers like and the layout LayerNorm likes: nothing is copied between them. Attention takes
tokens (B, N, C), a free view of the same memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2vit.models.dense import Linear, hooked, pieces, plus
from l2vit.models.depthwise import DepthwiseConv
from l2vit.models.linear_attention import (
    Observer,
    combine,
    factor,
    linear_attention,
    split_heads,
)
from l2vit.models.tracing import certain, symbolic

HEAD_WIDTH = 32
LOW_PRECISION = (torch.float16, torch.bfloat16)
_MULTIPLIED_OUT = 256
MlpKind = Literal["plain", "pvt2", "local"]
OrderKind = Literal["auto", "kv", "qk"]


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


_frozen_statistics = False


@contextlib.contextmanager
def frozen_statistics() -> Iterator[None]:
    """Inside, training batches leave BatchNorm2d's running statistics as they are."""
    global _frozen_statistics
    before, _frozen_statistics = _frozen_statistics, True
    try:
        yield
    finally:
        _frozen_statistics = before


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that computes in, and keeps its running statistics in, fp32.

    Works whatever the precision of its weights and input (bf16 parameters under DeepSpeed, fp16,
    ``model.bfloat16()``); float64 stays float64. Input and output (B, C, H, W).
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
        update = self.training and self.track_running_stats and not _frozen_statistics
        momentum = 0.0 if self.momentum is None else self.momentum
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
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


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside, operations keep the precision of their inputs. Nothing to do where it is off
    already, which keeps the meta device and the exporters out of it."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


class ConditionalPosition(nn.Module):
    """CPE (Sec. 4.3): ``x + depthwise 3×3 conv(x)``, with bias; (B, H, W, C) to the same."""

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = DepthwiseConv(dim, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv.with_input(x)


class LocalConcentration(nn.Module):
    """LCM (eq. 6, 7): depthwise conv, GELU, BatchNorm, depthwise conv; (B, H, W, C) to the same."""

    def __init__(self, dim: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv1 = DepthwiseConv(dim, kernel_size)
        self.norm = BatchNorm2d(dim)
        self.conv2 = DepthwiseConv(dim, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        x = to_nchw(self.conv1.with_gelu(x))
        return self.conv2(to_nhwc(self.norm(x)))


class Mlp(nn.Module):
    """Linear, GELU, linear on the last dimension; the other kinds need (B, H, W, C).

    With ``grad_checkpointing`` a large hidden layer is never whole in memory: its pieces are made
    once more in the backward pass.

    Args:
        dim: channels in and out.
        hidden: channels between the two linear layers.
        kind: plain; pvt2 puts a depthwise 3×3 conv before the GELU (Fig. 4 middle); local has
            BatchNorm and GELU after the first linear layer and again after the conv (Fig. 4 right).
    """

    def __init__(self, dim: int, hidden: int, kind: MlpKind = "plain") -> None:
        super().__init__()
        require_one_of("mlp", kind, MlpKind)
        self.kind = kind
        self.hidden = hidden
        self.grad_checkpointing = False
        self.fc1 = Linear(dim, hidden)
        self.norm1 = BatchNorm2d(hidden) if kind == "local" else None
        self.conv = DepthwiseConv(hidden, 3) if kind != "plain" else None
        self.norm2 = BatchNorm2d(hidden) if kind == "local" else None
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """The layers' output, plus ``add`` of the same shape if given."""
        if self.kind == "plain":
            count = 1 if hooked(self.fc1) or hooked(self.fc2) else pieces(x, self.hidden)
            return self._plain(x, add) if count == 1 else self._in_pieces(x, add, count)
        x = self.fc1(x)
        if self.norm1 is not None:
            x = F.gelu(to_nhwc(self.norm1(to_nchw(x))))
        if self.conv is not None:
            x = self.conv(x)
        if self.norm2 is not None:
            x = to_nhwc(self.norm2(to_nchw(x)))
        return plus(self.fc2, F.gelu(x), add)

    def _plain(self, x: Tensor, add: Tensor | None) -> Tensor:
        fused = isinstance(self.fc1, Linear)
        return plus(self.fc2, self.fc1.with_gelu(x) if fused else F.gelu(self.fc1(x)), add)

    def _in_pieces(self, x: Tensor, add: Tensor | None, count: int) -> Tensor:
        parts = x.flatten(0, -2).chunk(count)
        adds = [None] * len(parts) if add is None else add.flatten(0, -2).chunk(count)
        call: Any = self._plain
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            call = partial(checkpoint, self._plain, use_reentrant=False)
        return torch.cat([call(*pair) for pair in zip(parts, adds, strict=True)]).view(x.shape)


def shortfall(size: int, multiple: int) -> int:
    """What ``size`` lacks to a multiple; a form that sympy, unlike the remainder, sees through."""
    return (size + multiple - 1) // multiple * multiple - size


def residual(
    x: Tensor,
    branch: nn.Module,
    norm: nn.Module,
    drop_path: nn.Module,
    call: Callable[..., Tensor] | None = None,
) -> Tensor:
    """``x + drop_path(branch(norm(x)))``; unless it may drop or its output is wanted by a hook, the
    branch adds x on its way out.

    Args:
        call: how to call the branch with the normed x and, where it is to add it, with x.
    """
    call = branch if call is None else call
    if hooked(branch) or (drop_path.training and isinstance(drop_path, DropPath)):
        return x + drop_path(call(norm(x)))
    return call(norm(x), x)


def pad_to_multiple(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad (B, H, W, C) on the bottom and right until H, W are multiples of the sizes."""
    bottom, right = shortfall(x.shape[1], height), shortfall(x.shape[2], width)
    if certain(bottom == 0) and certain(right == 0):
        return x
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def window_partition(x: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W, C) to windows (B·H/height·W/width, height·width, C), row-major; sizes divide."""
    b, h, w, c = x.shape
    x = x.view(b, h // height, height, w // width, width, c).transpose(2, 3)
    return x.reshape(-1, height * width, c)


def window_merge(
    windows: Tensor, height: int, width: int, h: int, w: int, add: Tensor | None = None
) -> Tensor:
    """Windows of :func:`window_partition` back to the (B, h, w, C) they came from, plus ``add``
    of that shape if given, in one pass."""
    c = windows.shape[-1]
    x = windows.view(-1, h // height, w // width, height, width, c).transpose(2, 3)
    if add is not None:
        x = add.view(x.shape) + x
    return x.reshape(-1, h, w, c)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v for (..., N, d), through PyTorch's fused kernel.

    On CPUs that kernel's backward pass in bf16 takes six times as long as the products it
    replaces, so short sequences (windows) are multiplied out there.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    if slow and k.shape[-2] <= _MULTIPLIED_OUT and not torch.compiler.is_compiling():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def window_index(h: int, w: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows of an (h, w) map as indices, (places,) and (h·w,).

    Returns:
        The token at each place of each window, h·w at padding; and the place of each token.
    """
    # Not -(-h // size): ONNX divides towards zero.
    down, right = (h + size - 1) // size, (w + size - 1) // size
    inside = torch.arange(size, device=device)
    y = (torch.arange(down, device=device) * size)[:, None, None, None] + inside[:, None]
    x = (torch.arange(right, device=device) * size)[:, None, None] + inside
    tokens = torch.where((y < h) & (x < w), y * w + x, h * w)
    y, x = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)
    places = ((y // size * right + x // size) * size + y % size) * size + x % size
    return tokens.flatten(), places.flatten()


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention (eq. 1) over tokens (B, N, C), fused where PyTorch can.

    Args:
        dim: C.
        num_heads: divides ``dim``.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention before the output projection, (B, N, C); ``bias`` is added to the scaled
        scores and broadcasts to (B, heads, N, N)."""
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = softmax_attention(q, k, v, bias)
        return out.transpose(1, 2).reshape(b, n, c)

    def forward(self, x: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        return plus(self.proj, self.attend(x, bias), add)


class WindowAttention(SoftmaxAttention):
    """Softmax attention inside non-overlapping windows of a (B, H, W, C) feature map.

    A map that the window does not divide is zero-padded on the bottom and right; the padding takes
    part in the softmax, then is cropped (the released weights were trained so).
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 7) -> None:
        super().__init__(dim, num_heads)
        self.window_size = window_size

    def forward(self, x: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """Attention, plus ``add`` (B, H, W, C) if given."""
        h, w, size = x.shape[1], x.shape[2], self.window_size
        if symbolic(h, w):
            return plus(self.proj, self._attend_by_index(x, bias), add)
        x = pad_to_multiple(x, size, size)
        padded_h, padded_w = x.shape[1], x.shape[2]
        # Projected before they are merged: the windows that the attention keeps for its backward
        # pass are then the ones that the projection keeps.
        x = self.proj(self.attend(window_partition(x, size, size), bias))
        if certain(padded_h == h) and certain(padded_w == w):
            return window_merge(x, size, size, h, w, add)
        x = window_merge(x, size, size, padded_h, padded_w)[:, :h, :w]
        return x.contiguous() if add is None else add + x

    def _attend_by_index(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """For exporters: windows and crop as views have strides that depend on the open sizes."""
        b, h, w, c = x.shape
        area = self.window_size**2
        tokens, places = window_index(h, w, self.window_size, x.device)
        x = F.pad(x.reshape(b, h * w, c), (0, 0, 0, 1)).index_select(1, tokens)
        x = self.attend(x.view(-1, area, c), bias).view(b, -1, c)
        return x.index_select(1, places).view(b, h, w, c)


class LinearCore(nn.Module):
    """Linear attention with ReLU features (eq. 4, Sec. 4.1, 4.2), without its projections.

    Per head: ``out = s · q (kᵀ v) / max(q · Σ k, clamp)`` with q, k after ReLU. kᵀ v and the
    denominator are accumulated in fp32 whatever the input's precision.

    Args:
        dim: C.
        num_heads: divides ``dim``.
        use_scale: learn s, one factor per head, initially ``head_width^-0.5``; else s = 1.
        clamp: lower bound of the denominator (Table 10).
        order: auto multiplies q kᵀ first when N < head width (Sec. 11); the result is the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        use_scale: bool = True,
        clamp: float = 100.0,
        order: OrderKind = "auto",
    ) -> None:
        super().__init__()
        require_one_of("order", order, OrderKind)
        self.num_heads = num_heads
        self.head_width = dim // num_heads
        self.clamp = clamp
        self.order = order
        self.scale = (
            nn.Parameter(torch.full((num_heads, 1, 1), self.head_width**-0.5))
            if use_scale
            else None
        )
        self.observer: Observer | None = None
        """Called in every forward with the unclamped fp32 denominators (B, heads, N, 1)."""

    def combine(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Weighted sum of v (B, heads, n, d) with q, k after ReLU; (B, heads, N, d)."""
        first = self._multiply_qk_first(k.shape[2])
        with without_autocast(v):
            return combine(q, k, v, self.scale, self.clamp, qk_first=first, observer=self.observer)

    def _multiply_qk_first(self, tokens: int) -> bool:
        if self.order != "auto":
            return self.order == "qk"
        return certain(tokens < self.head_width)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """What each query gives each key, (B, heads, N, n), with q, k after ReLU."""
        return (q @ k.transpose(2, 3)) * factor(q, k, self.scale, self.clamp, self.observer)


class LinearAttention(LinearCore):
    """Multi-head enhanced linear attention on (B, N, C); arguments as :class:`LinearCore`."""

    def __init__(self, dim: int, num_heads: int, **core: Any) -> None:
        super().__init__(dim, num_heads, **core)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def attend(self, x: Tensor) -> Tensor:
        """Attention before the output projection, (B, N, C)."""
        qkv = self.qkv(x)
        with without_autocast(x):
            return linear_attention(
                qkv,
                self.scale,
                self.num_heads,
                self.clamp,
                qk_first=self._multiply_qk_first(x.shape[1]),
                observer=self.observer,
            )

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Attention, plus ``add`` (B, N, C) if given."""
        return plus(self.proj, self.attend(x), add)

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Tensor:
        """The weights that each token gives to each other, (B, heads, N, N), for pictures."""
        q, k, _ = split_heads(self.qkv(x), self.num_heads)
        return self.weights(q, k)
