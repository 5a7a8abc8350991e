"""The device that pictures are on: small arrays get there, kernels prove themselves there."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """``array`` on ``device``; on a GPU without waiting for what is under way there."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def check_passes(what: str, device: torch.device, check: Callable[[], None]) -> bool:
    """Whether ``check`` of kernels on ``device`` raises nothing; a warning says what it raised."""
    try:
        check()
    except Exception as error:  # whatever goes wrong, the tensor operations are there
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"{what} are not used on {device}: {reason}", stacklevel=3)
        return False
    return True
