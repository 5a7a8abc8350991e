"""What the pyramid hosts PVT, Swin and CSwin have in common; the attention is an argument."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from l2vit.models.attentions import core_factory, linear_blocks
from l2vit.models.cores import CoreFactory, Grid, resize_bias, resize_grid
from l2vit.models.dense import Linear, plus
from l2vit.models.layers import Mlp, MlpKind, residual, to_nchw, to_nhwc
from l2vit.models.pyramid import Pyramid, Stage, update_model_input_size

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostArguments:
    """Constructor arguments every host takes.

    Attributes:
        img_size: the size the tables of the model are built for.
        embed_dims: channels per stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        mlp_ratios: hidden channels of the MLP over ``embed_dims``.
        types: which blocks hold ``attention``: see :func:`l2vit.models.attentions.linear_blocks`.
        attention: softmax, enhanced (L²ViT's), focused (FLatten's), injective (InLine's), or any
            factory from a :class:`l2vit.models.cores.Site`; the other blocks have the host's own
            softmax attention.
        window_size: of the softmax blocks where the host has windows; PVT has none and takes it for
            the sake of one interface.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; grows linearly from 0 over all blocks.
    """

    img_size: int | tuple[int, int] = 224
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "avg"
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)
    types: str = "SSSS"
    attention: str | CoreFactory = "softmax"
    window_size: int = 7
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def grid(self, stage: int) -> Grid:
        """(H, W) of a stage: a quarter of the image, halved from stage to stage."""
        height, width = to_2tuple(self.img_size)
        return height // (4 << stage), width // (4 << stage)


class Projected(nn.Module):
    """A core between projections, on (B, H, W, C).

    Args:
        dim: C.
        core: see :mod:`l2vit.models.cores`.
        raw_source: the core's ``source`` is the block's input before its norm (CSwin).
    """

    def __init__(self, dim: int, core: nn.Module, *, raw_source: bool = False) -> None:
        super().__init__()
        self.raw_source = raw_source
        self.core: Any = core
        self.proj = Linear(dim, dim)

    def project(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, N, C), k and v (B, n, C) of normalised tokens (B, N, C)."""
        raise NotImplementedError

    def attend(
        self, tokens: Tensor, source: Tensor, grid: Grid, add: Tensor | None = None
    ) -> Tensor:
        """(B, N, C) to the same, plus ``add``; N is H·W, or more where there are prefix tokens."""
        return plus(self.proj, self.core(*self.project(tokens, grid), grid, source), add)

    def forward(self, x: Tensor, raw: Tensor, add: Tensor | None = None) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        source = raw if self.raw_source else x
        add = add if add is None else add.flatten(1, 2)
        return self.attend(x.flatten(1, 2), source.flatten(1, 2), grid, add).view(x.shape)

    @torch.no_grad()
    def attention_map(self, x: Tensor) -> Tensor:
        """The weights of each query over all keys, (B, heads, N, n), for pictures.

        ``x`` is what the module gets, (B, H, W, C).

        Raises:
            NotImplementedError: the core works in windows, or weighs channels.
        """
        q, k, _ = self.project(x.flatten(1, 2), (x.shape[1], x.shape[2]))
        return self.core.weights(q, k)


class FusedProjected(Projected):
    """One linear layer makes q, k and v (Swin, CSwin, DeiT)."""

    def __init__(self, dim: int, core: nn.Module, *, raw_source: bool = False) -> None:
        super().__init__(dim, core, raw_source=raw_source)
        self.qkv = Linear(dim, 3 * dim)

    def project(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        return q, k, v


class HostBlock(nn.Module):
    """``x + attention(LN(x))``, then ``x + MLP(LN(x))``, on (B, H, W, dim)."""

    def __init__(
        self, dim: int, attention: nn.Module, mlp: nn.Module, eps: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # The attention is given x itself, too: some cores reduce it for keys and values.
        x = residual(
            x, self.attn, self.norm1, self.drop_path, lambda y, *add: self.attn(y, x, *add)
        )
        return residual(x, self.mlp, self.norm2, self.drop_path)


class ConvEmbed(nn.Module):
    """Convolution, LayerNorm (eps 1e-5) and perhaps a position table: (B, H, W, in) to (.., out).

    Args:
        grid: (H, W) out, for the table and the check.
        positions: add a learned table; on another grid it is resized bilinearly.
        image: the input is an image (B, in, H, W).
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        grid: Grid,
        *,
        kernel: int,
        stride: int,
        padding: int = 0,
        positions: bool = False,
        image: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.image = grid, image
        self.conv = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)
        self.pos_embed = None
        if positions:
            self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last) if self.image else to_nchw(x)
        x = self.norm(to_nhwc(self.conv(x)))
        if self.pos_embed is None:
            return x
        table = self.pos_embed.unflatten(1, self.grid)
        if (x.shape[1], x.shape[2]) != self.grid:
            size = (x.shape[1], x.shape[2])
            table = to_nhwc(F.interpolate(to_nchw(table), size, mode="bilinear"))
        return x + table


TABLES = ("positional_encoding", "pos_embed", "relative_position_bias_table")


def resize_tables(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` with position tables resized to the shapes in ``target``, and a line for each.

    Bicubic, align_corners False, no antialias (families.md section 5); everything else unchanged.

    Raises:
        ValueError: a table that is no square grid.
    """
    resized, lines = dict(state), []
    for name, value in state.items():
        wanted = target.get(name)
        if wanted is None or wanted.shape == value.shape or not name.endswith(TABLES):
            continue
        if wanted.ndim != value.ndim or wanted.shape[-1] != value.shape[-1]:
            continue
        resize, axis = (resize_bias, 0) if value.ndim == 2 else (resize_grid, 1)
        resized[name] = resize(value, wanted.shape[axis])
        lines.append(f"resized {name} from {value.shape[axis]} to {wanted.shape[axis]} rows")
    return resized, lines


def adapt_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's checkpoint filter: weights of another input size made to fit ``model``, with a log.

    Raises:
        ValueError: a table that is no square grid, or is to become another one.
    """
    resized, lines = resize_tables(state, model.state_dict())
    if any(resized[name].shape != state[name].shape for name in _grid_tables(state)):
        _require_square(model.img_size)
    for line in lines:
        _logger.info(line)
    return resized


def _grid_tables(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tables with a row for each place of a stage's grid."""
    return [name for name in state if name.endswith(TABLES[:2])]


def _require_square(*sizes: Any) -> None:
    """A table does not tell its grid's sides: 16 rows may be 4×4, 8×2 or 2×8."""
    for size in map(to_2tuple, sizes):
        if size[0] != size[1]:
            raise ValueError(f"position tables cannot be resized for or from images of {size}")


def _prune_like(other: nn.Module, model: nn.Module) -> None:
    """Drop from ``other`` the stages, blocks and norms that ``model`` lost as a backbone."""
    for name, part in model.named_children():
        if isinstance(part, nn.ModuleList | nn.Sequential):
            setattr(other, name, getattr(other, name)[: len(part)])
        elif isinstance(part, nn.Identity):
            setattr(other, name, nn.Identity())


class Resizable(nn.Module):
    """A model that can be rebuilt for another input size; ``arguments`` made it what it is."""

    arguments: dict[str, Any]
    img_size: tuple[int, int]

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | None = None,
    ) -> None:
        """Rebuild for another input size or window; position tables are resized (and logged).

        Raises:
            ValueError: the windows do not divide the new grids or make other parameters of them,
                or position tables would have to be resized from or to another shape than a square.
        """
        changes: dict[str, Any] = {"num_classes": self.num_classes}
        if img_size is not None:
            changes["img_size"] = img_size
        if window_size is not None:
            changes["window_size"] = window_size
        other = type(self)(**{**self.arguments, **changes})
        for name in ("head", "global_pool"):  # as reset_classifier may have left them
            if hasattr(self, name):
                setattr(other, name, getattr(self, name))
        _prune_like(other, self)
        reference = next(self.parameters())
        other.to(reference.device, reference.dtype)
        other.load_state_dict(self._state_for(other))
        for old, new in zip(self.parameters(), other.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        for before, after in zip(self.modules(), other.modules(), strict=True):
            for name in ("training", "grad_checkpointing", "observer"):
                if hasattr(before, name):
                    setattr(after, name, getattr(before, name))
        for name, value in vars(other).items():
            if name in ("_modules", "_parameters", "_buffers") or not name.startswith("_"):
                setattr(self, name, value)
        update_model_input_size(self, self.img_size, window_size=window_size)

    def _state_for(self, other: Any) -> dict[str, Tensor]:
        """The weights, resized for ``other``, which may differ from this model by its size only."""
        own = self.state_dict()
        if _grid_tables(own) and to_2tuple(self.img_size) != to_2tuple(other.img_size):
            _require_square(self.img_size, other.img_size)
        state, wanted = adapt_state_dict(own, other), other.state_dict()
        odd = {(n, t.shape) for n, t in state.items()} ^ {(n, t.shape) for n, t in wanted.items()}
        if odd:
            raise ValueError(
                f"images of {to_2tuple(other.img_size)} need other parameters than those of"
                f" {to_2tuple(self.img_size)} ({min(odd)[0]}): choose a window_size of the same"
                " share of the image"
            )
        return state


class Host(Resizable, Pyramid):
    """A pyramid built by its subclass's :meth:`embed` and :meth:`attend` for each stage and block.

    Class attributes, set by the hosts: ``block_eps``, of the LayerNorms in blocks and between
    stages; ``mlp_kind``; ``stage_norms``, a LayerNorm behind each stage; ``final_norm``.
    """

    block_eps = 1e-5
    mlp_kind: MlpKind = "plain"
    stage_norms = False
    final_norm = True

    def __init__(self, arguments: Any) -> None:
        a = arguments
        blocks = linear_blocks(a.types, a.depths)
        factory = core_factory(a.attention)
        norm = partial(nn.LayerNorm, eps=self.block_eps)
        rates: Any = iter(calculate_drop_path_rates(a.drop_path_rate, sum(a.depths)))
        stages = []
        for stage, dim in enumerate(a.embed_dims):
            made = []
            for index, linear in enumerate(blocks[stage]):
                attention = self.attend(a, stage, index, factory if linear else None)
                mlp = Mlp(dim, int(dim * a.mlp_ratios[stage]), self.mlp_kind)
                made.append(HostBlock(dim, attention, mlp, self.block_eps, next(rates)))
            down = self.embed(a, stage) if stage else nn.Identity()
            stages.append(Stage(down, made, norm(dim) if self.stage_norms else nn.Identity()))
        width = a.embed_dims[-1]
        super().__init__(
            stem=self.embed(a, 0),
            stages=stages,
            dims=a.embed_dims,
            norm=norm(width) if self.final_norm else nn.Identity(),
            head=ClassifierHead(width, a.num_classes, a.global_pool, a.drop_rate, input_fmt="NHWC"),
            in_chans=a.in_chans,
            num_classes=a.num_classes,
            img_size=a.img_size,
        )
        self.arguments = vars(a)
        coarsest = 4 << (len(a.depths) - 1)
        if self.fixed_size() and any(side % coarsest for side in self.img_size):
            raise ValueError(f"img_size {self.img_size} is not a multiple of {coarsest}")
        self.apply(self.init_weights)

    @staticmethod
    def embed(arguments: Any, stage: int) -> nn.Module:
        """What makes (B, H, W, C) of a stage from the stage before, or from the image."""
        raise NotImplementedError

    @staticmethod
    def attend(arguments: Any, stage: int, index: int, factory: CoreFactory | None) -> nn.Module:
        """The attention of a block; without ``factory`` the host's own softmax attention."""
        raise NotImplementedError

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        """Linear layers truncated normal 0.02 with zero bias; all else as it was made."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def fixed_size(self) -> bool:
        """Whether the model takes only images of the size it was built for."""
        return True

    def forward_stem(self, x: Tensor) -> Tensor:
        built = to_2tuple(self.img_size)
        if self.fixed_size() and x.shape[-2:] != torch.Size(built):
            raise ValueError(
                f"the model was built for images of {built}, not {tuple(x.shape[-2:])}: "
                "give it img_size or call set_input_size"
            )
        return super().forward_stem(x)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are not decayed: relative position tables."""
        return {n for n, _ in self.named_parameters() if n.endswith("relative_position_bias_table")}
