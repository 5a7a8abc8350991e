"""What the model may ask while a compiler or an exporter looks on, and the export for any size."""

from __future__ import annotations

import torch
import torch.fx.experimental._config as symbolic_shapes
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import _get_current_dispatch_mode

SMALLEST = 33
"""Pixels from which :func:`export_any_size` works: the last stage has two rows and columns."""


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """Whether torch.export is at work: the truth in compilers, too, where ``is_exporting`` always
    says yes. They run this for real while they trace, and keep the answer."""
    return torch.compiler.is_exporting()


def eager() -> bool:
    """Whether nobody looks on who must see PyTorch's general operators: forms for one device may
    run. Such are compilers, torch.jit.trace, torch.func and modes like torch's FLOP counter."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and _get_current_dispatch_mode() is None
    )


def certain(condition: bool) -> bool:
    """Whether a condition on sizes holds; where they are symbolic, whether it always does.

    Compilers and exporters with dynamic sizes would otherwise tie their result to the answer.
    Nothing is certain in torch.jit.trace, whose result may be given images of any size.
    """
    return not torch.jit.is_tracing() and statically_known_true(condition)


def symbolic(*sizes: int) -> bool:
    """Whether an exporter keeps one of ``sizes`` open. Compilers, which take any answer to a
    question about a size and compile again where it no longer holds, show plain numbers."""
    return exporting() and any(isinstance(size, torch.SymInt) for size in sizes)


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
