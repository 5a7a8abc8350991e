"""Weights of one input size made to fit another: position tables resized, models rebuilt."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from l2vit.models.backbone import update_model_input_size

_logger = logging.getLogger(__name__)

TABLES = ("positional_encoding", "pos_embed", "relative_position_bias_table")


def resize_tables(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` with position tables resized to the shapes in ``target``, and a line for each.

    Bicubic, align_corners False, no antialias, as the authors fine-tune at another size; everything
    else unchanged.

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


def resize_grid(table: Tensor, tokens: int) -> Tensor:
    """A (1, n, C) table over a square grid resized to ``tokens`` rows.

    Bicubic, align_corners False, no antialias. One row more than a square is a class token's: it
    comes first and is left alone.

    Raises:
        ValueError: a row count is neither a square nor one more.
    """
    old, new = _side(table.shape[1]), _side(tokens)
    prefix = table.shape[1] - old * old
    if prefix != tokens - new * new:
        raise ValueError(f"cannot resize a table of {table.shape[1]} rows to {tokens}")
    kept, grid = table[:, :prefix], table[:, prefix:]
    grid = grid.transpose(1, 2).unflatten(2, (old, old)).float()
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([kept, grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def resize_bias(table: Tensor, rows: int) -> Tensor:
    """A relative position table ((2w−1)², heads) resized bicubically to ``rows`` rows."""
    return resize_grid(table[None], rows)[0]


def _side(rows: int) -> int:
    side = math.isqrt(rows)
    if rows - side * side > 1:
        raise ValueError(f"a table of {rows} rows is no square grid")
    return side
