"""Which mode PyTorch runs in: plain eager, compiling, tracing, exporting."""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import _get_current_dispatch_mode


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """True inside torch.export. Compilers run this for real while they trace and keep the answer;
    in what they trace, ``is_exporting`` itself always says yes."""
    return torch.compiler.is_exporting()


def plain_eager() -> bool:
    """True in plain eager mode: no compile, trace, functorch or dispatch mode (FLOP counters)."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and _get_current_dispatch_mode() is None
    )


def compiling() -> bool:
    """True while torch.compile or torch.export traces."""
    return torch.compiler.is_compiling()


def statically_true(condition: bool) -> bool:
    """Whether a condition on sizes holds; where they are symbolic, whether it always does.

    Compilers and exporters with dynamic sizes would otherwise tie their result to the answer.
    False in torch.jit.trace, whose result may be given images of any size.
    """
    return not torch.jit.is_tracing() and statically_known_true(condition)


def has_open_sizes(*sizes: int) -> bool:
    """Whether an exporter keeps one of ``sizes`` open. Compilers, which take any answer to a
    question about a size and compile again where it no longer holds, show plain numbers."""
    return exporting() and any(isinstance(size, torch.SymInt) for size in sizes)
