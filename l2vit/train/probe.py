"""A linear probe: the classifier learns, all below it stays as it is."""

from __future__ import annotations

import types
from typing import Any, cast

import torch
from torch import nn

from l2vit.errors import ConfigError


def fix_body(network: nn.Module) -> None:
    """Make ``network`` compute all below its classifier as in evaluation, without gradients.

    BatchNorm keeps its statistics and drop path drops nothing, also in training mode.

    Args:
        network: of timm: ``forward_features``, ``forward_head`` and ``get_classifier``.

    Raises:
        ConfigError: a network without these.
    """
    if not hasattr(network, "forward_features") or not hasattr(network, "get_classifier"):
        raise ConfigError(
            f"optim.train=head: {type(network).__name__} does not tell its classifier from the rest"
        )
    changed = cast(Any, network)
    changed.train = types.MethodType(_train_classifier, network)
    changed.forward_features = types.MethodType(_features, network)
    network.train(network.training)


def _train_classifier(network: nn.Module, mode: bool = True) -> nn.Module:
    """``Module.train`` that leaves the modules below the classifier in evaluation mode."""
    nn.Module.train(network, mode)
    own = set(cast(Any, network).get_classifier().modules())
    for module in network.modules():
        module.training = mode and (module in own or module is network)
    return network


def _features(network: nn.Module, images: torch.Tensor, *others: Any, **options: Any) -> Any:
    with torch.no_grad():
        return type(network).forward_features(network, images, *others, **options)  # type: ignore[attr-defined]
