"""L²ViT transcribed from the paper's equations, one line of text at a time, for comparison.

Tokens (B, N, C) throughout, explicit transposes around every convolution, explicit softmax in the
windows, explicit masks nowhere. Tensor names are those of the authors' released checkpoints. Slow
and plain on purpose: the benchmark's yardstick and the tests' second opinion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvEmbed(nn.Module):
    """Sec. 4.3's stem: two 3×3 convolutions of stride 2 with BatchNorm, ReLU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, 2, 1),
            nn.BatchNorm2d(dim // 2),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Down(nn.Module):
    """Stem and LayerNorm, or LayerNorm and 2×2 convolution of stride 2."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.first = dim == 3
        self.proj = ConvEmbed(out) if self.first else nn.Conv2d(dim, out, 2, 2)
        self.norm = nn.LayerNorm(out if self.first else dim)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        if self.first:
            x = F.pad(x, (0, -width % 4, 0, -height % 4))
        else:
            x = self.norm(x).transpose(1, 2).reshape(x.shape[0], -1, height, width)
            x = F.pad(x, (0, width % 2, 0, height % 2))
        x = self.proj(x)
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        return (self.norm(x) if self.first else x), height, width


class Position(nn.Module):
    """CPE."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        picture = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)
        return x + self.proj(picture).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, *, linear: bool) -> None:
        super().__init__()
        self.heads = dim // 32
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if linear:
            self.temperature = nn.Parameter(torch.full((self.heads, 1, 1), 32**-0.5))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1], qkv[2]

    def softmax(self, x: Tensor) -> Tensor:
        """Eq. 1."""
        q, k, v = self.split(x)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))

    def linear(self, x: Tensor) -> Tensor:
        """Eq. 4 with ReLU, clamp at 100 and scale."""
        q, k, v = self.split(x)
        q, k = F.relu(q), F.relu(k)
        denominator = (q @ k.sum(2).unsqueeze(-1)).clamp(min=100)
        out = (q @ (k.transpose(-2, -1) @ v)) * self.temperature / denominator
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Lcm(nn.Module):
    """Eq. 6 and 7."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)
        x = self.conv2(self.bn(F.gelu(self.conv1(x))))
        return x.flatten(2).transpose(1, 2)


class Feedforward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """LWA or LGA (Fig. 3)."""

    def __init__(self, dim: int, window: int, *, linear: bool) -> None:
        super().__init__()
        self.window, self.is_linear = window, linear
        self.cpe = nn.ModuleList(Position(dim) for _ in range(1 if linear else 2))
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, linear=linear)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Feedforward(dim)
        if linear:
            self.norm3 = nn.LayerNorm(dim)
            self.local_mp = Lcm(dim)

    def windows(self, x: Tensor, height: int, width: int) -> Tensor:
        b, _, c = x.shape
        w = self.window
        x = F.pad(x.view(b, height, width, c), (0, 0, 0, -width % w, 0, -height % w))
        rows, columns = x.shape[1] // w, x.shape[2] // w
        x = x.view(b, rows, w, columns, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, c)
        x = self.attn.softmax(x)
        x = x.view(b, rows, columns, w, w, c).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, rows * w, columns * w, c)[:, :height, :width]
        return x.reshape(b, height * width, c)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.cpe[0](x, height, width)
        if self.is_linear:
            x = x + self.attn.linear(self.norm1(x))
            x = x + self.local_mp(self.norm3(x), height, width)
        else:
            x = x + self.windows(self.norm1(x), height, width)
            x = self.cpe[1](x, height, width)
        return x + self.mlp(self.norm2(x))


class PaperL2ViT(nn.Module):
    """Image (B, 3, H, W) to logits (B, classes)."""

    def __init__(
        self, width: int, depths: tuple[int, ...], window: int = 7, classes: int = 1000
    ) -> None:
        super().__init__()
        dims = [width * 2**stage for stage in range(len(depths))]
        self.downsample_layers = nn.ModuleList(
            Down(dims[stage - 1] if stage else 3, dim) for stage, dim in enumerate(dims)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, window, linear=index % 2 == 1) for index in range(depth))
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        for down, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x, height, width = down(x, height, width)
            for block in blocks:
                x = block(x, height, width)
        return self.head(self.norm(x).mean(1))
