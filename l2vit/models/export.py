"""Export of an L²ViT for images of any size."""

from __future__ import annotations

import torch
import torch.fx.experimental._config as symbolic_shapes
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

SMALLEST = 33
"""Pixels from which :func:`export_any_size` works: the last stage has two rows and columns."""


def export_any_size(model: nn.Module, images: Tensor) -> ExportedProgram:
    """``torch.export`` of an L²ViT for any batch, height and width from :data:`SMALLEST` pixels.

    ``torch.onnx.export`` takes the result. Its module takes a single image, too, as
    ``module(check_guards=False)``: the exporter notes that a batch of 1 has ambiguous strides.

    Args:
        model: in evaluation mode.
        images: (2, in_chans, H, W) or more, an example of any content.
    """
    sides = {2: Dim("height", min=SMALLEST), 3: Dim("width", min=SMALLEST)}
    # Otherwise sizes derived from the input count as other than 1, and the last stage's may not be.
    with symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(
            model, (images,), dynamic_shapes=({0: Dim("batch"), **sides},), strict=False
        )
