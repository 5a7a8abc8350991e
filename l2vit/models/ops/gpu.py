"""When the Triton kernels run: on NVIDIA GPUs from Ampere on, once they agreed with PyTorch there.

Switched off by the environment (``L2VIT_TRITON=0``) or by :func:`use_triton`. Triton itself is
imported when the first CUDA tensor arrives.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from l2vit.models.ops.modes import compiling, exporting, plain_eager

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability: bf16 and tf32 products
_DEVICES = ("cuda",)
_on = os.environ.get("L2VIT_TRITON", "1") != "0"
_verdicts: dict[tuple[str, int], bool] = {}
Check = Callable[[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]]
"""Outputs and gradients of a tiny input, by the kernels and by the reference."""


@contextlib.contextmanager
def use_triton(on: bool) -> Iterator[None]:
    """Inside, the kernels run where they can (True, the default) or not at all (False)."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def may_run(kernel: str, x: Tensor) -> bool:
    """Whether a kernel (see ``_check``) is to be used for ``x`` instead of PyTorch."""
    if not _on or x.device.type not in _DEVICES or x.dtype not in _DTYPES:
        return False
    if not (compiling() or plain_eager()):
        return False
    return _proven(kernel, x.device.type, x.device.index or 0)


@torch.compiler.assume_constant_result
def _proven(kernel: str, kind: str, index: int) -> bool:
    """Compilers run this for real while they trace, and keep the answer."""
    if exporting():
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


def _check(kernel: str) -> Check:
    """The comparison of a kernel with its reference; importing it registers the operator."""
    if kernel == "linear_attention":
        from l2vit.models.ops.triton_linear_attention import check
    elif kernel == "window_attention":
        from l2vit.models.ops.triton_window_attention import check
    elif kernel == "local_concentration":
        from l2vit.models.ops.triton_local_concentration import check
    elif kernel == "layer_norm":
        from l2vit.models.ops.triton_layer_norm import check
    else:
        from l2vit.models.ops.triton_depthwise import check
    return check


def _agrees(kernel: str, device: torch.device) -> bool:
    """Compare forward and backward with PyTorch on a tiny input; warn where they differ."""
    try:
        check = _check(kernel)
        with (
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(0)
            for dtype in _DTYPES:
                got, expected = check(device, dtype)
                require_close(got, expected, dtype)
    except Exception as error:  # whatever goes wrong, PyTorch's way is there
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            f"the Triton kernel {kernel} is not used on {device}: {type(error).__name__}: {reason}",
            stacklevel=2,
        )
        return False
    return True


def require_close(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Norms of differences within eight roundings of the type: fused code rounds less often. Not
    below 1e-3: PyTorch's convolutions and products may use tf32.

    Raises:
        ArithmeticError: names the first result that differs by more.
    """
    limit = max(1e-3, 8 * torch.finfo(dtype).eps)
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        if not error <= limit:
            raise ArithmeticError(f"result {place} in {dtype} differs by {error:.1e} from PyTorch")
