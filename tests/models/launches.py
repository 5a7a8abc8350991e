"""The launches of Triton kernels in a training step of a model, and their compilation."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from l2vit.models import ops
from l2vit.plan.recorder import Recorder
from l2vit.plan.trace import trace

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """What Triton makes a binary of its own for."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    """Type of each argument."""
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    """Arguments that are multiples of 16."""
    options: tuple[tuple[str, int], ...]

    def of_kind(self, kind: str) -> Launch:
        """The same in fp16, which differs from bf16 in the pointers' type only."""
        signature = tuple((name, value.replace("bf16", kind)) for name, value in self.signature)
        return replace(self, signature=signature)

    def compile(self, architecture: int) -> Any:
        """As on a GPU of this compute capability."""
        signature = dict(self.signature)
        divisible = {(list(signature).index(name),): _DIVISIBLE for name in self.divisible}
        source = ASTSource(
            kernels()[self.kernel], signature, constexprs=dict(self.constants), attrs=divisible
        )
        target = GPUTarget("cuda", architecture, 32)
        return triton.compile(source, target=target, options=dict(self.options))


_DIVISIBLE = [["tt.divisibility", 16]]


@functools.cache
def kernels() -> dict[str, JITFunction[Any]]:
    """All kernels of the models by name."""
    found = {}
    for path in sorted(Path(ops.__file__).parent.glob("triton_*.py")):
        module = importlib.import_module(f"l2vit.models.ops.{path.stem}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found[name] = value
    return found


def launches(name: str, *, size: int, dtype: torch.dtype, **options: Any) -> set[Launch]:
    """Those of a training step of 128 images."""
    found = set()

    def note(recorder: Recorder, kernel: str, arguments: dict[str, Any]) -> None:
        found.add(_launch(kernel, arguments))

    with mock.patch.object(Recorder, "add_kernel", note):
        trace(
            lambda: timm.create_model(name, num_classes=10, img_size=size, **options),
            batch=128,
            input_size=size,
            classes=10,
            dtype=dtype,
        )
    return found


def _launch(name: str, arguments: dict[str, Any]) -> Launch:
    kernel = kernels()[name]
    signature, constants, divisible = [], [], []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        kind = f"*{KINDS[value.dtype]}" if isinstance(value, Tensor) else "i32"
        signature.append((parameter.name, "fp32" if isinstance(value, float) else kind))
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            divisible.append(parameter.name)
    options = tuple((option, arguments[option]) for option in OPTIONS if option in arguments)
    return Launch(name, tuple(signature), tuple(constants), tuple(divisible), options)
