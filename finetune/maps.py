"""What a trained network looks at: Grad-CAM, attention maps, clamped denominators."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2vit.errors import UserError
from l2vit.models.l2vit import WindowAttention
from l2vit.models.layers import pad_to_multiple
from l2vit.models.ops.windows import partition


@dataclass(frozen=True)
class AttentionMap:
    """The attention weights of one layer on one image, averaged over its heads."""

    layer: str
    kind: str
    """linear or window; in the other backbones softmax, focused, injective, ..."""
    grid: tuple[int, int]
    weights: Tensor
    """(N, N) fp32: row i holds the weights of token i's query on every token."""

    def of_token(self, row: int, column: int) -> Tensor:
        """(H, W): the weights of the query at that place of the grid."""
        return self.weights[row * self.grid[1] + column].view(self.grid)


def grad_cam(
    model: nn.Module, images: Tensor, layer: str = "", classes: Tensor | None = None
) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017; paper Fig. 1) at the output of ``layer``.

    ``relu(Σ_c w_c A_c)`` with A the layer's feature map and w_c the mean over positions of the
    class score's gradient; scaled to a maximum of 1 per image (a map of zeros stays zero).

    Args:
        model: in evaluation mode, from timm.
        images: (B, 3, H, W) normalised, on the model's device.
        layer: module whose output is a feature map, or tokens of one; default the last stage, and
            with a class token the last block's first norm (behind its attention the patches no
            longer speak for any class).
        classes: (B,) int64 output each map explains; default the model's first answer.

    Returns:
        (B, H, W) fp32 in [0, 1], bilinearly enlarged to the input's size.

    Raises:
        UserError: no such layer, or its output is no feature map.
    """
    layer = layer or _last_layer(model)
    found: list[Tensor] = []
    handle = _module(model, layer).register_forward_hook(lambda _m, _i, out: found.append(out))
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())
            features = found[0]
            _feature_map(model, layer, features)  # refused before any arithmetic
            wanted = logits.argmax(1) if classes is None else classes
            score = logits.gather(1, wanted[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, features)
    finally:
        handle.remove()
    weights = _feature_map(model, layer, gradient).float().mean((1, 2), keepdim=True)
    cam = F.relu((weights * _feature_map(model, layer, features.detach()).float()).sum(3))
    cam = F.interpolate(cam[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    largest = cam.amax((1, 2), keepdim=True)
    return cam / largest.clamp(min=torch.finfo(torch.float32).tiny)


def _last_layer(model: Any) -> str:
    last = str(model.feature_info[-1]["module"])
    return last if getattr(model, "cls_token", None) is None else f"{last}.norm1"


def _feature_map(model: Any, layer: str, x: Tensor) -> Tensor:
    """A layer's output as (B, H, W, C); tokens before the grid's (a class token) are left out."""
    if isinstance(x, Tensor) and x.ndim == 4:
        return x if getattr(model, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if isinstance(x, Tensor) and x.ndim == 3 and grid and x.shape[1] >= grid[0] * grid[1]:
        return x[:, -grid[0] * grid[1] :].unflatten(1, grid)
    raise UserError(f"--layer {layer}: its output is no feature map of an image")


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [n for n, _ in model.named_children()]
        raise UserError(f"no layer {name!r} in this model; it begins with {names}") from None


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose attention map can be drawn, by name, in the order of the network."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, WindowAttention) or hasattr(module, "attention_map")
    }


@torch.no_grad()
def attention_maps(model: nn.Module, image: Tensor, max_tokens: int = 4096) -> list[AttentionMap]:
    """The map of every attention layer on one image.

    Linear attention's by multiplying q kᵀ first, which gives the same function (paper Fig. 2).

    Args:
        model: in evaluation mode.
        image: (1, 3, H, W) normalised.
        max_tokens: layers with more tokens are left out (their maps have N² entries).
    """
    maps: list[AttentionMap] = []

    def watch(name: str, module: Any) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            tokens = x.shape[1] * x.shape[2] if x.ndim == 4 else x.shape[1]
            if tokens > max_tokens:
                return
            if isinstance(module, WindowAttention):
                kind, grid = "window", (x.shape[1], x.shape[2])
                weights = window_map(module, x)[0].mean(0)
            else:
                kind, grid = _kind(module), _grid(module, x, image)
                try:
                    weights = module.attention_map(x)[0].float().mean(0)
                except NotImplementedError:
                    return
                if weights.shape[0] != weights.shape[1]:
                    return  # fewer keys than queries: no map from place to place
                count = grid[0] * grid[1]
                weights = weights[-count:, -count:]  # without the class token
            maps.append(AttentionMap(name, kind, grid, weights))

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in attention_layers(model).items():
            stack.callback(module.register_forward_pre_hook(watch(name, module)).remove)
        model(image)
    return maps


def _kind(module: Any) -> str:
    core = getattr(module, "core", None)
    return "linear" if core is None else type(core).__name__.removesuffix("Attention").lower()


def _grid(module: Any, x: Tensor, image: Tensor) -> tuple[int, int]:
    """Rows and columns of tokens (B, H, W, C), or (B, N, C) of an image of known shape."""
    if x.ndim == 4:
        return x.shape[1], x.shape[2]
    if hasattr(module, "grid"):
        return module.grid
    tokens, (height, width) = x.shape[1], image.shape[2:]
    rows = round(math.sqrt(tokens * height / width))
    if rows < 1 or tokens % rows:
        return 1, tokens
    return rows, tokens // rows


def window_map(attention: WindowAttention, x: Tensor) -> Tensor:
    """(B, heads, H·W, H·W): softmax weights of window attention, 0 between windows.

    Padding takes part in the softmax, so rows of windows with padding sum to less than 1.

    Args:
        attention: the layer.
        x: (B, H, W, C), what it gets.
    """
    b, h, w, c = x.shape
    size, heads = attention.window_size, attention.num_heads
    padded = pad_to_multiple(x, size)
    windows = partition(padded, size, size)
    qkv = attention.qkv(windows).view(len(windows), size**2, 3, heads, c // heads)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).float().unbind(0)
    inside = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(c // heads), -1)
    height, width = padded.shape[1:3]
    places = torch.arange(height * width, device=x.device).view(1, height, width, 1)
    places = partition(places, size, size)[..., 0]
    full = inside.new_zeros(b, heads, height * width, height * width)
    inside = inside.view(b, len(places), heads, size**2, size**2)
    for number, place in enumerate(places):
        full[:, :, place[:, None], place[None, :]] = inside[:, number]
    full = full.view(b, heads, height, width, height, width)[:, :, :h, :w, :h, :w]
    return full.reshape(b, heads, h * w, h * w)


@torch.no_grad()
def clamped_shares(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Share of denominators below the lower bound, by layer (paper Sec. 4.1, Table 10).

    Args:
        model: in evaluation mode.
        images: (B, 3, H, W) normalised.
    """
    shares: dict[str, list[float]] = {}
    with observed(model, shares):
        model(images)
    return {name: sum(values) / len(values) for name, values in shares.items()}


@contextlib.contextmanager
def observed(model: nn.Module, shares: dict[str, list[float]]) -> Iterator[None]:
    """Collect every clamped layer's share into ``shares`` while the context lasts."""

    def watch(name: str, bound: float) -> Any:
        def observe(denominators: Tensor) -> None:
            shares.setdefault(name, []).append((denominators < bound).float().mean().item())

        return observe

    watched = []
    for name, module in model.named_modules():
        if hasattr(module, "observer") and hasattr(module, "clamp"):
            watched.append((module, module.observer))
            module.observer = watch(name, float(module.clamp))  # type: ignore[assignment,arg-type]
    try:
        yield
    finally:
        for module, before in watched:
            module.observer = before  # type: ignore[assignment]
