"""One training micro-batch without a device: every operation's cost and every byte kept.

The model runs forward and backward on the meta device, where tensors have shapes and no data. A
dispatch mode sees each operation, so arithmetic and memory traffic are the model's own, not a
formula's, and storages are followed from allocation to release, which gives the peak.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from l2vit.plan.devices import Device


@dataclass(frozen=True)
class Operation:
    """One call of a kernel."""

    kind: str
    """matmul (matrix units), vector (arithmetic elsewhere) or memory (traffic alone)."""
    flops: float
    bytes: float
    """Read and written once each."""


@dataclass(frozen=True)
class Trace:
    """Forward and backward of one micro-batch."""

    operations: Counter[Operation]
    parameters: int
    kept_bytes: int
    """What the forward pass keeps for the backward pass."""
    peak_bytes: int
    """Most bytes alive at once beside the weights; gradients are not counted."""
    low_precision: bool

    @property
    def flops(self) -> float:
        """Floating-point operations, two to a multiply-add."""
        return sum(op.flops * count for op, count in self.operations.items())

    def seconds(self, device: Device) -> float:
        """Time on ``device``: each operation is bound by arithmetic, traffic or its launch."""
        matmul = device.matmul_tflops * device.matmul_share * 1e12
        speeds = {
            "matmul": matmul * (1.0 if self.low_precision else device.fp32_share),
            "vector": device.vector_tflops * device.vector_share * 1e12,
            "memory": 1e30,
        }
        bandwidth = device.memory_tbs * device.memory_share * 1e12
        return sum(
            count * max(op.flops / speeds[op.kind], op.bytes / bandwidth, device.kernel_us * 1e-6)
            for op, count in self.operations.items()
        )


def trace(
    make: Callable[[], nn.Module],
    *,
    batch: int,
    input_size: int,
    classes: int,
    dtype: torch.dtype,
    backward: bool = True,
) -> Trace:
    """Run ``make()`` on the meta device.

    Args:
        make: builds the model (in training mode).
        batch: images in the micro-batch.
        input_size: their height and width.
        classes: columns of the logits.
        dtype: of weights and activations; the loss is computed in fp32.
        backward: False traces an evaluation step instead.
    """
    with torch.device("meta"):
        model = make().to(dtype).train(backward)
    gradients: list[Tensor] = []
    recorder = _Recorder([*model.parameters(), *model.buffers()])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(backward))
        stack.enter_context(_fused_attention(recorder))
        stack.enter_context(recorder)
        size = (batch, 3, input_size, input_size)
        images = torch.empty(size, dtype=dtype, device="meta")
        targets = torch.empty(batch, classes, device="meta")
        logits = model(images).float()
        if backward:
            loss = F.cross_entropy(logits, targets)
            kept = recorder.alive
            stack.enter_context(_gradients_taken(model, recorder, gradients))
            loss.backward()
        else:
            kept = recorder.alive
    parameters = sum(p.numel() for p in model.parameters())
    return Trace(recorder.operations, parameters, kept, recorder.peak, dtype != torch.float32)


@contextlib.contextmanager
def _gradients_taken(
    model: nn.Module, recorder: _Recorder, gradients: list[Tensor]
) -> Iterator[None]:
    """Take each weight's gradient out of the count: ZeRO's formulas speak of gradients."""

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        recorder.discount(parameter.grad)
        gradients.append(parameter.grad)
        parameter.grad = None

    handles = [
        p.register_post_accumulate_grad_hook(take) for p in model.parameters() if p.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchDispatchMode):
    """Notes each operation and follows the storages it makes, except those ``given`` to it."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.alive = 0
        self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._follow(tensor)
        if inputs and not func.is_view and not _only_a_view(inputs, outputs):
            self._note(func, args, kwargs, result, sum(map(_bytes, [*inputs, *outputs])))
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, moved: float) -> None:
        if func.overloadpacket in _CONVOLUTIONS:
            kind, flops = _convolution(func, args, result)
        else:
            count = flop_registry.get(func.overloadpacket)
            kind, flops = "matmul", float(count(*args, **kwargs, out_val=result)) if count else 0.0
        self.add(kind, flops, moved)

    def add(self, kind: str, flops: float, moved: float) -> None:
        """Note one operation."""
        self.operations[Operation(kind if flops else "memory", flops, moved)] += 1

    def discount(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` no longer."""
        self._release(tensor.untyped_storage()._cdata)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)


def _bytes(tensor: Tensor) -> float:
    """Bytes a kernel touches: an expanded tensor has fewer than its shape says."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _only_a_view(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Reshapes that needed no copy: another shape of the same storage, nothing written."""
    own = {tensor.untyped_storage()._cdata for tensor in inputs}
    return bool(outputs) and all(
        tensor._is_view() and tensor.untyped_storage()._cdata in own for tensor in outputs
    )


_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


def _convolution(func: Any, args: Any, result: Any) -> tuple[str, float]:
    """Kind and arithmetic of a convolution; PyTorch's own count forgets the groups backwards.

    Backward costs one convolution for the input's gradient, where wanted, and one for the weight's.
    """
    if func.overloadpacket is torch.ops.aten.convolution:
        image, weight, transposed, output, times = args[0], args[1], args[6], result, 1
    else:
        output, image, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        times = int(wanted[0]) + int(wanted[1])
    places = image.numel() if transposed else output.numel()
    # One channel a group cannot use the matrix units.
    kind = "vector" if weight.shape[1] == 1 else "matmul"
    return kind, times * 2.0 * places * weight[0].numel()


@contextlib.contextmanager
def _fused_attention(recorder: _Recorder) -> Iterator[None]:
    """Puts what a fused attention kernel keeps and costs in the place of the plain form.

    The meta device has only the plain form, which keeps the whole attention matrix; devices have
    kernels that keep queries, keys, values, output and one number a row.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return cast(Tensor, _Attention.apply(q, k, v, recorder))

    # Patched and not a function mode: those are off while gradient checkpointing recomputes.
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, recorder: _Recorder) -> Tensor:
        rows, width = q.numel() // q.shape[-1], q.shape[-1]
        ctx.flops = 4.0 * rows * k.shape[-2] * width
        ctx.recorder = recorder
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output, torch.empty(rows, device=q.device))
        recorder.add("matmul", ctx.flops, sum(map(_bytes, (q, k, v, output))))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, output, _ = ctx.saved_tensors
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        moved = sum(map(_bytes, (q, k, v, output, grad, *grads)))
        ctx.recorder.add("matmul", 2.5 * ctx.flops, moved)
        return (*grads, None)
