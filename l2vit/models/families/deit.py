"""DeiT with the attention as an argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from l2vit.models.families.attention import AttentionFactory, AttentionSpec, Grid, SoftmaxAttention
from l2vit.models.families.base import FusedProjected, attention_factory
from l2vit.models.families.resize import Resizable
from l2vit.models.l2vit import LocalConcentration


class TokenProjected(FusedProjected):
    """Attention over a class token and the patches of a fixed grid, (B, 1 + H·W, C)."""

    def __init__(self, dim: int, core: nn.Module, grid: Grid) -> None:
        super().__init__(dim, core)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.attend(x, x, self.grid)

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Tensor:
        """The weights of each token over all tokens, (B, heads, N, N), for pictures."""
        q, k, _ = self.project(x, self.grid)
        return self.core.weights(q, k)


class DeitBlock(Block):
    """timm's block, with room for a local concentration module between attention and MLP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lcm: nn.Module | None = None

    def add_lcm(self, dim: int, kernel_size: int, grid: Grid) -> None:
        """Concentrate the patches of ``grid`` after attention (eq. 8)."""
        self.grid = grid
        self.lcm_norm = nn.LayerNorm(dim, eps=1e-6)
        self.lcm = LocalConcentration(dim, kernel_size)

    def concentrate(self, x: Tensor) -> Tensor:
        """``x + LCM(LN(x))`` on the patches; the class token has no neighbours and passes."""
        assert self.lcm is not None
        token, patches = x[:, :1], x[:, 1:].unflatten(1, self.grid)
        patches = patches + self.drop_path1(self.lcm(self.lcm_norm(patches)))
        return torch.cat([token, patches.flatten(1, 2)], dim=1)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """timm hands over masks too, which are None in a classifier."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        if self.lcm is not None:
            x = self.concentrate(x)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Deit(Resizable, VisionTransformer):  # type: ignore[misc]  # no patch_size
    """timm's vision transformer with a class token, patches of 16, and any attention.

    Takes only the input size it was built for (see ``set_input_size``).

    Args:
        img_size: the size the position table is built for.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        attention: a name of :data:`l2vit.models.families.base.ATTENTIONS`, or a factory from an
            AttentionSpec.
        lcm_kernel: of the module behind each attention that is not softmax; 0 for none. Tables 8
            and 11 print the parameters of a 3×3 one.
        softmax_blocks: indices of blocks that keep softmax attention (paper Table 11).
        window_size: there are no windows; taken for the sake of one interface.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        *,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        attention: str | AttentionFactory = "softmax",
        lcm_kernel: int = 0,
        softmax_blocks: Sequence[int] = (),
        window_size: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,  # type: ignore[arg-type]
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            block_fn=DeitBlock,
        )
        self.arguments = arguments
        self.img_size = to_2tuple(img_size)
        spec = AttentionSpec(embed_dim, num_heads, self.patch_embed.grid_size, prefix=1)
        for index, block in enumerate(self.blocks):
            factory = SoftmaxAttention if index in softmax_blocks else attention_factory(attention)
            block.attn = TokenProjected(embed_dim, factory(spec), spec.grid)
            self.init_attention(block.attn)
            if lcm_kernel and factory is not SoftmaxAttention:
                cast(DeitBlock, block).add_lcm(embed_dim, lcm_kernel, spec.grid)
        assert self.cls_token is not None
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    @staticmethod
    def init_attention(attention: TokenProjected) -> None:
        """Linear layers truncated normal 0.02 with zero bias, as timm does the rest."""
        for layer in (attention.qkv, attention.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
