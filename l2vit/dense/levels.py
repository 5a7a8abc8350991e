"""A timm backbone as a list of feature maps, each through a LayerNorm of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn

import l2vit.models  # noqa: F401  registers our models with timm
from l2vit.errors import ConfigError

LEVEL_EPS = 1e-5


class Levels(nn.Module):
    """Images (B, 3, H, W) to maps (B, C, H/s, W/s), finest first; strides 4, 8, 16, 32.

    Args:
        body: a timm model made with ``features_only=True``.
        norms: put a LayerNorm (weight 1, bias 0) on every map. The classifier's final norm is not
            used (the authors' recipes).
    """

    def __init__(self, body: nn.Module, *, norms: bool = True) -> None:
        super().__init__()
        self.body = body
        info: Any = body.feature_info
        self.channels: list[int] = list(info.channels())
        self.strides: list[int] = list(info.reduction())
        kinds = [LayerNorm2d(c, eps=LEVEL_EPS) if norms else nn.Identity() for c in self.channels]
        self.norms = nn.ModuleList(kinds)

    def forward(self, images: Tensor) -> list[Tensor]:
        images = images.to(next(self.body.parameters()).dtype)
        return [norm(x) for norm, x in zip(self.norms, self.body(images), strict=True)]


def make_levels(
    name: str,
    *,
    stages: Sequence[int],
    norms: bool = True,
    grad_checkpointing: bool = False,
    **arguments: Any,
) -> Levels:
    """The maps of the stages ``stages`` (counted from 0) of the model called ``name``.

    Args:
        name: a model that timm knows after ``import l2vit``.
        stages: which stages give a map.
        norms: see :class:`Levels`.
        grad_checkpointing: recompute the blocks in the backward pass.
        arguments: of the model's constructor; ``window_size`` only if it takes it.

    Raises:
        ConfigError: no such model, or one that refuses an argument or gives no maps.
    """
    if not timm.is_model(name):
        raise ConfigError(f"model.name: timm knows no {name!r}")
    body = _create(name, out_indices=tuple(stages), **arguments)
    if grad_checkpointing:
        try:
            body.model.set_grad_checkpointing(True)  # the wrapper itself has no such method
        except (AttributeError, AssertionError):
            raise ConfigError(
                f"engine.grad_checkpointing: {name} cannot; set it to false"
            ) from None
    return Levels(body, norms=norms)


def _create(name: str, **arguments: Any) -> Any:
    try:
        return timm.create_model(name, features_only=True, **arguments)
    except TypeError as error:
        if "window_size" in arguments and "'window_size'" in str(error):
            del arguments["window_size"]
            return _create(name, **arguments)
        raise ConfigError(f"model.args: {name}: {error}") from None
    except (ValueError, RuntimeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"model: {name} cannot be a backbone so: {error}") from None
