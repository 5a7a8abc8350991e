"""Which parameters decay and how fast each learns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from l2vit.errors import ConfigError
from l2vit.train.zero import full_shape


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
        """Elements, those of parameters that ZeRO-3 has partitioned included."""
        return sum(torch.Size(full_shape(p)).numel() for p in self.params)


def param_groups(
    model: nn.Module,
    *,
    layer_decay: float = 1.0,
    decay: Literal["matrices", "all"] = "matrices",
    train: Literal["all", "head"] = "all",
) -> list[ParamGroup]:
    """Split the trainable parameters of ``model``.

    As timm does, but with a group for each rate and decay instead of one for each layer. Unless
    ``decay`` is all, parameters with at most one dimension (biases, norms) and those that the
    model's ``no_weight_decay()`` names do not decay. With ``layer_decay`` d below 1, a parameter k
    layers below the top learns at d^k of the rate, layers as the model's ``group_matcher`` says.
    With ``train`` "head" all but the classifier's parameters have the rate 0 and do not decay: they
    stay what they are to the bit, and checkpoints hold them like any other.

    Raises:
        ConfigError: layer decay for a model that does not say what its layers are.
    """
    if layer_decay != 1.0 and not hasattr(model, "group_matcher"):
        raise ConfigError(
            f"optim.layer_decay: {type(model).__name__} has no group_matcher; set it to 1"
        )
    settings = _by_parameter(model, layer_decay, decay)
    if train == "head":
        learns = {id(parameter) for parameter in cast(Any, model).get_classifier().parameters()}
        settings = {k: found if k in learns else (0.0, False) for k, found in settings.items()}
    groups: dict[tuple[float, bool], ParamGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decays = settings[id(parameter)]
        label = "fixed" if not scale else "decay" if decays else "no decay"
        group = groups.setdefault(
            (scale, decays), ParamGroup(f"{label} ×{scale:.4g}", [], [], decays, scale)
        )
        group.names.append(name)
        group.params.append(parameter)
    return list(groups.values())


def _by_parameter(
    model: nn.Module, layer_decay: float, decay: str
) -> dict[int, tuple[float, bool]]:
    """timm's groups as (factor on the rate, decays) by the parameter's identity."""
    given = cast(Any, model).no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    settings: dict[str, Any] = {
        "weight_decay": 1.0,
        "no_weight_decay_list": () if decay == "all" else tuple(given),
        "weight_decay_exclude_1d": decay != "all",
    }
    groups = (
        param_groups_weight_decay(model, **settings)
        if layer_decay == 1.0
        else param_groups_layer_decay(model, layer_decay=layer_decay, **settings)
    )
    return {
        id(parameter): (group.get("lr_scale", 1.0), group["weight_decay"] > 0)
        for group in groups
        for parameter in group["params"]
    }


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
