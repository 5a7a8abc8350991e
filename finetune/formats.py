"""The exported model in formats other than timm's: ONNX and torch.export."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from l2vit.errors import UserError

TOLERANCE = 1e-4
"""As `verification.TOLERANCE`, but larger: other runtimes add in another order."""
_EXAMPLE = 2


def onnx(directory: Path, model: nn.Module, inputs: Tensor) -> tuple[str, Tensor]:
    """Write ``model.onnx`` (input ``images``, output ``logits``, any batch) and run it.

    Args:
        directory: where to write.
        model: on the CPU, in evaluation mode.
        inputs: (N, 3, H, W) fp32; the answers are computed by onnxruntime on the CPU.

    Returns:
        The file's name and the (N, classes) logits.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}: pip install 'l2vit[export]'") from None
    name = "model.onnx"
    example = _batch(inputs, _EXAMPLE)
    with _quiet():
        torch.onnx.export(
            model,
            (example,),
            str(directory / name),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            dynamo=True,
        )
    session = onnxruntime.InferenceSession(
        str(directory / name), providers=["CPUExecutionProvider"]
    )
    answers = [
        torch.from_numpy(session.run(["logits"], {"images": part.numpy()})[0])
        for part in inputs.split(8)
    ]
    return name, torch.cat(answers)


def export(directory: Path, model: nn.Module, inputs: Tensor) -> tuple[str, Tensor]:
    """Write ``model.pt2`` (torch.export, any batch), load it again and run it; see `onnx`."""
    name = "model.pt2"
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with _quiet():
        program = torch.export.export(model, (_batch(inputs, _EXAMPLE),), dynamic_shapes=shapes)
        torch.export.save(program, directory / name)
        loaded = torch.export.load(directory / name).module()
    with torch.inference_mode():
        return name, torch.cat([loaded(part) for part in inputs.split(8)])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress marks and warnings about torch's internals."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _batch(inputs: Tensor, count: int) -> Tensor:
    """``count`` images: a traced batch of 1 would be taken for a constant."""
    return inputs[:1].expand(count, -1, -1, -1).contiguous()
