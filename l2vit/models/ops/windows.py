"""Feature maps (B, H, W, C) to windows and back, as views and, for exporters, by index."""

from __future__ import annotations

import torch
from torch import Tensor


def partition(x: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W, C) to windows (B·H/height·W/width, height·width, C), row-major; sizes divide."""
    b, h, w, c = x.shape
    x = x.view(b, h // height, height, w // width, width, c).transpose(2, 3)
    return x.reshape(-1, height * width, c)


def merge(windows: Tensor, height: int, width: int, h: int, w: int) -> Tensor:
    """Windows of :func:`partition` back to the (B, h, w, C) they came from."""
    c = windows.shape[-1]
    x = windows.view(-1, h // height, w // width, height, width, c).transpose(2, 3)
    return x.reshape(-1, h, w, c)


def partition_by_index(x: Tensor, size: int) -> Tensor:
    """As :func:`partition`; its views have strides that depend on sizes an exporter keeps open."""
    b, h, w, c = x.shape
    # Not -(-h // size): ONNX divides towards zero.
    down, right = (h + size - 1) // size, (w + size - 1) // size
    inside = torch.arange(size, device=x.device)
    y = (torch.arange(down, device=x.device) * size)[:, None, None, None] + inside[:, None]
    column = (torch.arange(right, device=x.device) * size)[:, None, None] + inside
    tokens = (y * w + column).flatten()
    return x.reshape(b, h * w, c).index_select(1, tokens).view(-1, size * size, c)


def merge_by_index(windows: Tensor, size: int, b: int, h: int, w: int) -> Tensor:
    """The inverse of :func:`partition_by_index`."""
    c = windows.shape[-1]
    right = (w + size - 1) // size
    y = torch.arange(h, device=windows.device)[:, None]
    x = torch.arange(w, device=windows.device)
    places = (((y // size * right + x // size) * size + y % size) * size + x % size).flatten()
    return windows.view(b, -1, c).index_select(1, places).view(b, h, w, c)
