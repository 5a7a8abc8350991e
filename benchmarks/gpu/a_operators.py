"""Block A: what the card reaches, whether our kernels are right, and each operator's rivals.

python benchmarks/gpu/a_operators.py
python benchmarks/gpu/a_operators.py --dry-run     # on a CPU
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import ROOT, Block
from torch import Tensor

from l2vit.models import ops

STAGES = ((56, 128), (28, 256), (14, 512), (7, 1024))  # side and channels of l2vit_base


def ceilings(block: Block) -> dict[str, float]:
    """Speed of a plain copy and of a large product."""
    count, side = (1 << 16, 64) if block.dry else (1 << 28, 8192)
    source = torch.ones(count, device=block.device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=block.device, dtype=block.dtype)
    copying = block.milliseconds(lambda: target.copy_(source))
    product = block.milliseconds(lambda: a @ a)
    return {"copy_tbs": 8e-9 * count / copying, "product_tflops": 2e-9 * side**3 / product}


def right(block: Block) -> dict[str, Any]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/models", "tests/data"]
    command += ["--collect-only"] if block.dry else []
    if block.dry:
        return {"command": " ".join(command[1:])}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"status": done.returncode, "last": done.stdout.strip().splitlines()[-3:]}


def timed(block: Block, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Forward alone, and with backward: ours, PyTorch's, and what inductor makes of the latter."""

    def forward(run: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            run(*inputs)

    def both(run: Callable[..., Tensor]) -> None:
        out = run(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    def switched(on: bool, run: Callable[..., Tensor], *given: Tensor) -> Tensor:
        with ops.use_triton(on):
            return run(*given)

    ways = {"ours": partial(switched, True, call), "pytorch": partial(switched, False, call)}
    if not block.dry:
        torch.compiler.reset()
        ways["compiled"] = partial(switched, False, torch.compile(call, dynamic=False))
    return {
        way: {
            "forward_ms": block.milliseconds(partial(forward, run)),
            "both_ms": block.milliseconds(partial(both, run)),
        }
        for way, run in ways.items()
    }


def operators(block: Block) -> None:
    """Every operator of ours at every stage, then every product's shape, batch 128."""
    batch = 1 if block.dry else 128
    stages = STAGES[3:] if block.dry else STAGES

    def random(*shape: int) -> Tensor:
        like = {"device": block.device, "dtype": block.dtype}
        return torch.randn(shape, **like, requires_grad=True)

    for side, dim in stages:
        heads = dim // 32
        for size in (3, 7):
            x = random(batch, side, side, dim).permute(0, 3, 1, 2)
            inputs = (x, random(dim, 1, size, size), random(dim))
            block.measure(f"depthwise {size}x{size} at {side}", partial(
                timed, block, ops.depthwise_conv, inputs
            ))  # fmt: skip
        attend = partial(ops.linear_attention, num_heads=heads, clamp=100.0)
        inputs = (random(batch, side * side, 3 * dim), random(heads, 1, 1))
        block.measure(f"linear attention at {side}", partial(timed, block, attend, inputs))
        for window in (7, 12):
            whole = side if window == 7 else -(-side // 12) * 12
            attend = partial(ops.window_attention, num_heads=heads, window=window)
            inputs = (random(batch, whole, whole, 3 * dim),)
            name = f"window attention {window} at {whole}"
            block.measure(name, partial(timed, block, attend, inputs))
        inputs = (random(batch, side, side, dim), random(dim), random(dim))
        block.measure(f"layer norm at {side}", partial(timed, block, _beside_its_norm, inputs))
        for name, wide in (("qkv", 3 * dim), ("proj", dim), ("fc1", 4 * dim)):
            call = partial(_product, block, batch * side * side, dim, wide)
            block.measure(f"product {name} at {side}", call)


def _beside_its_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x, normalized = ops.residual_layer_norm(x, weight, bias, 1e-5)
    return x + normalized


def _product(block: Block, rows: int, inner: int, columns: int) -> dict[str, float]:
    a = torch.randn(rows, inner, device=block.device, dtype=block.dtype)
    layer = torch.nn.Linear(inner, columns, device=block.device, dtype=block.dtype)
    with torch.no_grad():
        taken = block.milliseconds(lambda: layer(a))
    return {"ms": taken, "tflops": 2e-9 * rows * inner * columns / taken}


def main(argv: list[str] | None = None) -> None:
    """Run the block."""
    block = Block("a_operators", "Ceilings, tests and operators.", argv)
    block.measure("ceilings", lambda: ceilings(block))
    block.measure("tests", lambda: right(block))
    operators(block)


if __name__ == "__main__":
    main()
