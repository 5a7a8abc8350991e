"""Parameters and operations of detectors and segmentors, part by part, without arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from l2vit.models.count import count_parameters, shapes_only

DETECTION_SIZE = (800, 1280)
SEGMENTATION_SIZE = (512, 2048)
_BOXES, _MASKS = 1000, 100
_ATTENTION = ("aten.bmm", "aten.baddbmm")
_PER_VALUE = {nn.LayerNorm: 5, nn.BatchNorm2d: 2}


@dataclass
class Operations:
    """Multiply-adds of one picture, and what conventions of counting add to them."""

    products: int = 0
    """Matrix products and convolutions, the attention's own among them."""
    attention: int = 0
    """Of these, the products of queries, keys and values."""
    norms: int = 0
    """5 for each value through a LayerNorm, 2 through a BatchNorm."""
    conv_biases: int = 0
    """Output values of every convolution with a bias."""

    def __add__(self, other: Operations) -> Operations:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Operations(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclass
class Count:
    """What a model holds and does, in all and by part."""

    parameters: int
    multiply_adds: int
    """As the published table counts them."""
    convention: str
    size: tuple[int, int]
    parts: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)


def count_detector(model: Any, size: tuple[int, int] = DETECTION_SIZE) -> Count:
    """Backbone, pyramid and heads of ``retinanet`` or ``mask_rcnn``, norms counted.

    Mask R-CNN's heads see 1,000 boxes and 100 masks; pooling them is not counted.
    """
    twin: Any = shapes_only(model).eval()
    parts: dict[str, tuple[nn.Module, Operations]] = {}
    maps = _backbone(twin.backbone.levels, size, parts)
    fpn = twin.backbone.fpn
    features = _count(parts, "fpn", fpn, {str(i): x for i, x in enumerate(maps)})
    if hasattr(twin, "head"):
        _count(parts, "head", twin.head, list(features.values()))
    else:
        _count(parts, "rpn", twin.rpn.head, list(features.values()))
        heads, channels = twin.roi_heads, twin.backbone.out_channels
        pooled = torch.empty(_BOXES, channels, 7, 7, device="meta")
        _count(parts, "box_head", nn.Sequential(heads.box_head, heads.box_predictor), pooled)
        pooled = torch.empty(_MASKS, channels, 14, 14, device="meta")
        _count(parts, "mask_head", nn.Sequential(heads.mask_head, heads.mask_predictor), pooled)
    return _summed(model, parts, "products + norms", size, lambda o: o.products + o.norms)


def count_segmentor(model: Any, size: tuple[int, int] = SEGMENTATION_SIZE) -> Count:
    """Backbone, decoder and classifier; the auxiliary head has parameters but does no work.

    The published figures leave out the attention's own products and count convolutions' biases.
    """
    twin: Any = shapes_only(model).eval()
    parts: dict[str, tuple[nn.Module, Operations]] = {}
    maps = _backbone(twin.levels, size, parts)
    x = _count(parts, "decoder", twin.decoder, [maps[0], maps[0], *maps])
    _count(parts, "head", twin.head, x)
    parts["auxiliary"] = twin.auxiliary, Operations()
    return _summed(
        model,
        parts,
        "products - attention + conv biases",
        size,
        lambda o: o.products - o.attention + o.conv_biases,
    )


def _backbone(
    levels: nn.Module, size: tuple[int, int], parts: dict[str, tuple[nn.Module, Operations]]
) -> list[Tensor]:
    return _count(parts, "backbone", levels, torch.empty(1, 3, *size, device="meta"))


def _count(
    parts: dict[str, tuple[nn.Module, Operations]], name: str, module: nn.Module, inputs: Any
) -> Any:
    """Run a part on the meta device and note its operations."""
    found = Operations()

    def norm(each: nn.Module, given: tuple[Tensor, ...]) -> None:
        factor = next(f for kind, f in _PER_VALUE.items() if isinstance(each, kind))
        found.norms += factor * given[0].numel()

    def bias(each: nn.Module, given: Any, answer: Tensor) -> None:
        found.conv_biases += answer.numel()

    handles = []
    for each in module.modules():
        if isinstance(each, tuple(_PER_VALUE)):
            handles.append(each.register_forward_pre_hook(norm))
        if isinstance(each, nn.Conv2d | nn.ConvTranspose2d) and each.bias is not None:
            handles.append(each.register_forward_hook(bias))
    counter = FlopCounterMode(display=False)
    # Fused attention is opaque to the counter; the plain form does the same products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        answer = module(inputs)
    for handle in handles:
        handle.remove()
    by_kind = counter.get_flop_counts().get("Global", {})
    found.products = sum(by_kind.values()) // 2
    found.attention = sum(n for kind, n in by_kind.items() if str(kind) in _ATTENTION) // 2
    parts[name] = module, found
    return answer


def _summed(
    model: nn.Module,
    parts: dict[str, tuple[nn.Module, Operations]],
    convention: str,
    size: tuple[int, int],
    published: Callable[[Operations], int],
) -> Count:
    total = sum((operations for _, operations in parts.values()), Operations())
    listed = {
        name: {"parameters": count_parameters(module), **dataclasses.asdict(operations)}
        for name, (module, operations) in parts.items()
    }
    return Count(count_parameters(model), published(total), convention, size, listed)
