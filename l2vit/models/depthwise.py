"""Depthwise convolution on (B, H, W, C) feature maps."""

from __future__ import annotations

from torch import Tensor, nn


class DepthwiseConv(nn.Conv2d):
    """Depthwise k×k convolution, stride 1, same padding, with bias; (B, H, W, C) to the same."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
