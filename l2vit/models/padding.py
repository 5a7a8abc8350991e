"""Which window attentions of a network pad their feature maps at a given input size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l2vit.models.count import shapes_only

_LARGEST = 16
"""Windows above this are not suggested."""


@dataclass(frozen=True)
class PaddedStage:
    """A stage whose windows do not divide its feature map.

    Attributes:
        stage: counted from 1.
        grid: (H, W) of the feature map.
        window: height and width of a window.
        padded: (H, W) after padding to multiples of the window.
    """

    stage: int
    grid: tuple[int, int]
    window: tuple[int, int]
    padded: tuple[int, int]

    @property
    def share(self) -> float:
        """Padding among the positions that window attention sees, from 0 to 1."""
        return 1 - self.grid[0] * self.grid[1] / (self.padded[0] * self.padded[1])

    def sentence(self, input_size: int) -> str:
        """The warning for people."""
        (h, w), (padded_h, padded_w) = self.grid, self.padded
        return (
            f"window {self.window[0]} does not divide stage {self.stage}'s {h}x{w} grid at input"
            f" {input_size}: padded to {padded_h}x{padded_w}, {100 * self.share:.0f}% of the"
            " positions in window attention are padding, which costs accuracy"
        )


def padding_of(model: nn.Module, input_size: int) -> list[PaddedStage]:
    """The stages of ``model`` that pad at this input size, in order; empty where none does.

    Found by running the network without its values, so any number of stages and any stem will do.
    Watched are modules that have a ``window_size`` and are given feature maps (B, H, W, C): ours
    and timm's Swin. A network that takes only the size it was built for pads nothing at another.

    Args:
        model: an image network; left as it is. ``with torch.device("meta")`` builds one for free.
        input_size: height and width of the images in pixels.
    """
    found: dict[int, PaddedStage] = {}
    twin = shapes_only(model).eval()
    stages = [str(info["module"]) for info in getattr(twin, "feature_info", [])]
    for name, module in twin.named_modules():
        if name and hasattr(module, "window_size"):
            stage = next((i for i, s in enumerate(stages) if name.startswith(f"{s}.")), 0)
            module.register_forward_pre_hook(_watch(found, stage + 1))
    channels = getattr(model, "in_chans", 3)
    try:
        with torch.no_grad():
            twin(torch.empty(1, channels, input_size, input_size, device="meta"))
    except (ValueError, AssertionError):  # what models raise for a size they do not take
        return []
    return [found[stage] for stage in sorted(found)]


def _watch(found: dict[int, PaddedStage], stage: int) -> Callable[..., None]:
    def look(module: Any, inputs: tuple[Any, ...]) -> None:
        x, window = inputs[0], module.window_size
        window = (window, window) if isinstance(window, int) else tuple(window)
        if not isinstance(x, Tensor) or x.ndim != 4:
            return
        grid = (x.shape[1], x.shape[2])
        padded = (-(-grid[0] // window[0]) * window[0], -(-grid[1] // window[1]) * window[1])
        if padded != grid:
            found.setdefault(stage, PaddedStage(stage, grid, window, padded))

    return look


def padding_warnings(model: nn.Module, input_size: int) -> list[str]:
    """One sentence for each stage that pads at this input size; arguments as :func:`padding_of`.

    Padded positions take part in the softmax of window attention (the released weights were trained
    with it), so they dilute attention at the right and bottom edges.
    """
    return [stage.sentence(input_size) for stage in padding_of(model, input_size)]


def fitting_windows(model: nn.Module, input_size: int) -> list[int]:
    """Windows up to 16 with which no stage of ``model`` pads at this input size, largest last.

    Args:
        model: has ``set_input_size(window_size=...)``, as L²ViT does; left as it is.
        input_size: height and width of the images in pixels.
    """
    twin: Any = shapes_only(model)
    fitting = []
    for window in range(2, _LARGEST + 1):
        twin.set_input_size(window_size=window)
        if not padding_of(twin, input_size):
            fitting.append(window)
    return fitting
