"""Which parameters decay and how fast each learns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import timm.models
import torch
from torch import nn

from l2vit.errors import ConfigError


@dataclass
class ParamGroup:
    """Parameters that share weight decay and a factor on the learning rate."""

    name: str
    names: list[str]
    params: list[nn.Parameter]
    decays: bool
    lr_scale: float = 1.0

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)


def param_groups(
    model: nn.Module,
    *,
    layer_decay: float = 1.0,
    decay: Literal["matrices", "all"] = "matrices",
) -> list[ParamGroup]:
    """Split the trainable parameters of ``model``.

    Unless ``decay`` is all, no weight decay on parameters with at most one dimension (biases,
    norms), nor on what the model's ``no_weight_decay()`` names. With ``layer_decay`` d below 1, a
    parameter k layers below the top learns at d^k of the rate, layers as the model's
    ``group_matcher`` says (timm).

    Raises:
        ConfigError: layer decay for a model that does not say what its layers are.
    """
    exempt = set(cast(Any, model).no_weight_decay() if hasattr(model, "no_weight_decay") else ())
    scales = _layer_scales(model, layer_decay)
    groups: dict[tuple[float, bool], ParamGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = decay == "all" or (parameter.ndim > 1 and name not in exempt)
        scale = scales.get(name, 1.0)
        label = "decay" if decays else "no decay"
        group = groups.setdefault(
            (scale, decays), ParamGroup(f"{label} ×{scale:.4g}", [], [], decays, scale)
        )
        group.names.append(name)
        group.params.append(parameter)
    return list(groups.values())


def _layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    if layer_decay == 1.0:
        return {}
    if not hasattr(model, "group_matcher"):
        raise ConfigError(
            f"optim.layer_decay: {type(model).__name__} has no group_matcher; set it to 1"
        )
    matcher = cast(Any, model).group_matcher(coarse=False)
    layers = timm.models.group_parameters(model, matcher, reverse=True)
    top = max(layers.values())
    return {name: layer_decay ** (top - layer) for name, layer in layers.items()}


def optimizer_groups(groups: Iterable[ParamGroup], weight_decay: float) -> list[dict[str, Any]]:
    """The groups as torch optimizers take them; ``lr_scale`` stays for ``set_rates``."""
    return [
        {
            "params": group.params,
            "weight_decay": weight_decay if group.decays else 0.0,
            "decays": group.decays,
            "lr_scale": group.lr_scale,
        }
        for group in groups
    ]


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def table(groups: Iterable[ParamGroup], *, lr: float, weight_decay: float) -> str:
    """The groups as text for the console, one line each."""
    rows = [f"{'group':24} {'tensors':>8} {'parameters':>13} {'peak lr':>10} {'weight decay':>13}"]
    for group in groups:
        decay = weight_decay if group.decays else 0.0
        rows.append(
            f"{group.name:24} {len(group.names):8d} {group.numel:13,d}"
            f" {lr * group.lr_scale:10.3g} {decay:13.3g}"
        )
    return "\n".join(rows)
