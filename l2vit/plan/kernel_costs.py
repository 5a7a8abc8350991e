"""What one launch of each of our Triton kernels costs, by its name and arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelCost:
    """Cost of one launch beside the bytes of its arguments."""

    kind: str
    unit: str = "memory"
    flops: float = 0.0
    instructions: float = 0.0
    """Thread-instructions of the whole launch, by the compiled code for sm_90."""
    memory_share: float = 1.0
    """Part of a plain copy's memory speed it is expected to reach."""
    traffic: Mapping[str, float] = field(default_factory=dict)
    """Part of an argument that is read or written, where it is not the whole."""


_THIRD = 1 / 3
DEPTHWISE = {
    "forward": {3: 16.9, 5: 38.4, 7: 65.9},
    "gradients": {3: 30.7, 5: 79.5, 7: 137.8},
}
"""Thread-instructions an output, of the code compiled for sm_90 in bf16 (a test compares)."""


def _depthwise(direction: str) -> Callable[[dict[str, Any]], KernelCost]:
    def cost(given: dict[str, Any]) -> KernelCost:
        size, outputs = given["K"], given["x"].numel()
        products = 2 if direction == "gradients" else 1
        return KernelCost(
            "depthwise convolutions",
            "vector",
            2.0 * products * size * size * outputs,
            (DEPTHWISE[direction][size] + NORMED[direction] * given["NORMED"]) * outputs,
        )

    return cost


def _linear_attention(
    products: int, memory_share: float, *, dots: int = 0, **traffic: float
) -> Callable[[dict[str, Any]], KernelCost]:
    def cost(given: dict[str, Any]) -> KernelCost:
        tokens = given["qkv"].numel() / 3  # elements of one of q, k, v
        return KernelCost(
            "linear attention",
            "matmul",
            2.0 * tokens * (products * given["D"] + dots),
            memory_share=memory_share,
            traffic=traffic,
        )

    return cost


def _window_attention(products: int) -> Callable[[dict[str, Any]], KernelCost]:
    def cost(given: dict[str, Any]) -> KernelCost:
        elements, tokens = given["qkv"].numel() / 3, given["SIZE"] ** 2
        flops = 2.0 * products * elements * tokens
        return KernelCost("softmax attention", "matmul", flops, memory_share=0.8)

    return cost


def _gelu(direction: str) -> Callable[[dict[str, Any]], KernelCost]:
    def cost(given: dict[str, Any]) -> KernelCost:
        instructions = GELU[direction] * given["x"].numel()
        return KernelCost("batch norm", "vector", instructions=instructions)

    return cost


def _norm_gradient(given: dict[str, Any]) -> KernelCost:
    return KernelCost("layer norm", "vector", instructions=LAYER_NORM * given["x"].numel())


GELU = {"forward": 39.0, "gradient": 45.0}
"""Thread-instructions an element of GELU with a batch's statistics, and of both gradients."""
NORMED = {"forward": 8.5, "gradients": 6.0}
"""What normalising the input, and the gradients of the norm, add to a 7×7 convolution's."""
LAYER_NORM = 26.0
"""Thread-instructions an element of its gradient beside a residual, likewise."""
_COSTS: dict[str, Callable[[dict[str, Any]], KernelCost]] = {
    "taps_kernel": lambda given: KernelCost("depthwise convolutions"),
    "forward_kernel": _depthwise("forward"),
    "gradients_kernel": _depthwise("gradients"),
    "context_kernel": _linear_attention(1, 0.8, qkv=2 * _THIRD),
    "out_kernel": _linear_attention(1, 0.65, dots=1, qkv=_THIRD),
    "query_gradient_kernel": _linear_attention(2, 0.65, qkv=_THIRD, grad_qkv=_THIRD),
    "key_value_gradient_kernel": _linear_attention(2, 0.8, qkv=2 * _THIRD, grad_qkv=2 * _THIRD),
    "window_attention_kernel": _window_attention(2),
    "window_gradient_kernel": _window_attention(5),
    "window_gradient_in_blocks_kernel": _window_attention(7),
    "layer_norm_gradient_kernel": _norm_gradient,
    "add_parts_kernel": lambda given: KernelCost("sums"),
    "gelu_kernel": _gelu("forward"),
    "statistics_kernel": lambda given: KernelCost("batch norm"),
    "gelu_norm_gradient_kernel": _gelu("gradient"),
}


def cost(name: str, arguments: dict[str, Any]) -> KernelCost:
    """Cost of launching the kernel ``name``; one without an entry costs its arguments' bytes."""
    known = _COSTS.get(name)
    return known(arguments) if known else KernelCost("elementwise")
