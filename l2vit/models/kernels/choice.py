"""When the kernels run: on NVIDIA GPUs from Ampere on, once they have agreed with PyTorch there.

Switched off by the environment (``L2VIT_TRITON=0``) or by :func:`use`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from l2vit.models.tracing import eager

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability: bf16 and tf32 products
_DEVICES = ("cuda",)
_on = os.environ.get("L2VIT_TRITON", "1") != "0"
_verdicts: dict[tuple[str, int], bool] = {}


@contextlib.contextmanager
def use(on: bool) -> Iterator[None]:
    """Inside, the kernels run where they can (True, the default) or not at all (False)."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def chosen(kernel: str, x: Tensor) -> bool:
    """Whether a kernel (a module of this package) is to be used for ``x`` instead of PyTorch."""
    if not _on or x.device.type not in _DEVICES or x.dtype not in _DTYPES:
        return False
    if not (torch.compiler.is_compiling() or eager()):
        return False
    return _proven(kernel, x.device.type, x.device.index or 0)


@torch.compiler.assume_constant_result
def _proven(kernel: str, kind: str, index: int) -> bool:
    """Compilers run this for real while they trace, and keep the answer. In what they trace,
    ``is_exporting`` always says yes; here it tells the truth."""
    if torch.compiler.is_exporting():
        return False
    key = (kernel, index)
    if key not in _verdicts:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # a graph cannot hold the check; a later call makes it
        _verdicts[key] = _capable(index) and _agrees(kernel, torch.device(kind, index))
    return _verdicts[key]


def _capable(index: int) -> bool:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(index) >= _OLDEST


def _agrees(kernel: str, device: torch.device) -> bool:
    """Compare forward and backward with PyTorch on a tiny input; warn where they differ."""
    try:
        module = importlib.import_module(f"l2vit.models.kernels.{kernel}")
        with (
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(0)
            for dtype in _DTYPES:
                got, expected = module.check(device, dtype)
                _compare(got, expected, dtype)
    except Exception as error:  # whatever goes wrong, PyTorch's way is there
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            f"the Triton kernel {kernel} is not used on {device}: {type(error).__name__}: {reason}",
            stacklevel=2,
        )
        return False
    return True


def _compare(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Norms of differences within eight roundings of the type: fused code rounds less often. Not
    below 1e-3: PyTorch's convolutions and products may use tf32."""
    limit = max(1e-3, 8 * torch.finfo(dtype).eps)
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        if not error <= limit:
            raise ArithmeticError(f"result {place} in {dtype} differs by {error:.1e} from PyTorch")
