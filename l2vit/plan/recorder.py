"""Records what PyTorch is asked to do: operators, arithmetic, memory traffic, bytes alive.

Works on the meta device, where tensors have shapes and no data, so that a GPU's work is counted
on a machine without one. An operator of our own is followed inside: what its Python code calls
is recorded, and each Triton kernel by its cost in ``kernel_costs``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from l2vit.plan import kernel_costs
from l2vit.plan.kinds import ALLOCATION, WITHIN, kind_of


@dataclass(frozen=True)
class Operation:
    """One call of an operator, or one launch of a kernel of our own."""

    name: str
    kind: str
    """Where it belongs in a table (``kinds``)."""
    unit: str = "memory"
    """What its arithmetic runs on: matmul (matrix units), vector, or memory (none to speak of)."""
    flops: float = 0.0
    bytes: float = 0.0
    """Of the tensors read and written, each once."""
    instructions: float = 0.0
    """Thread-instructions issued, where the compiler's figure is known."""
    memory_share: float = 1.0
    """Part of a plain copy's memory speed that the kernel reaches."""


class Recorder(TorchDispatchMode):
    """Notes each operation and follows the storages it makes, except those ``given`` to it."""

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self._counting = True
        self._inside = 0
        self.alive = 0
        self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inside = _python_of(func)
        if inside is not None and _on_meta(args):
            ours = func.namespace == "l2vit"
            self._inside += ours
            try:
                with self:
                    return inside(*args, **kwargs)
            finally:
                self._inside -= ours
        result = _keep_layout(func, args, func(*args, **kwargs))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.follow(*outputs)
        if self._counting and not (_is_view(func) or _only_a_view(func, inputs, outputs)):
            self._note(func, args, kwargs, result, [*inputs, *outputs])
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, tensors: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        if func.namespace not in ("aten", "c10d", "_c10d_functional") or not tensors:
            return
        if func.overloadpacket in _CONVOLUTIONS:
            unit, flops = _convolution(func, args, result)
        else:
            count = flop_registry.get(func.overloadpacket)
            unit, flops = "matmul", float(count(*args, **kwargs, out_val=result)) if count else 0.0
        kind = kind_of(name, tensors)
        if kind == ALLOCATION and self._inside:
            kind = WITHIN
        moved = 0.0 if kind in (ALLOCATION, WITHIN) else sum(map(size_of, _distinct(tensors)))
        self.add(Operation(name, kind, unit if flops else "memory", flops, moved))

    def add(self, operation: Operation) -> None:
        """Note one operation."""
        self.operations[operation] += 1

    def add_kernel(self, name: str, arguments: dict[str, Any]) -> None:
        """Note one launch of the Triton kernel ``name``."""
        cost = kernel_costs.cost(name, arguments)
        moved = sum(
            size_of(tensor) * cost.traffic.get(argument, 1.0)
            for argument, tensor in _distinct_tensors(arguments).items()
        )
        operation = Operation(
            name, cost.kind, cost.unit, cost.flops, moved, cost.instructions, cost.memory_share
        )
        self.add(operation)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, storages are followed and operations are not noted."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def follow(self, *tensors: Tensor) -> None:
        """Count the storages of ``tensors`` from now until they are released."""
        for tensor in tensors:
            self._follow(tensor)

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


@contextlib.contextmanager
def kernels_recorded(recorder: Recorder) -> Iterator[None]:
    """Inside, launching a Triton kernel notes it and runs nothing."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return

    def run(kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **named: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | named
        recorder.add_kernel(kernel.fn.__name__, given)

    with mock.patch.object(JITFunction, "run", run):
        yield


def size_of(tensor: Tensor) -> float:
    """Bytes a kernel touches: an expanded tensor has fewer than its shape says."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Each piece of memory once: an operator in place gets and returns the same."""
    found = {(t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t for t in tensors}
    return list(found.values())


def _distinct_tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments, each once: one may stand in for another that is absent."""
    found: dict[int, str] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found.setdefault(value.untyped_storage()._cdata, name)
    return {name: arguments[name] for name in found.values()}


def _python_of(func: Any) -> Any:
    """The Python code of an operator of ours, or what a composite operator is made of."""
    if func.namespace == "l2vit":
        operator = _maybe_get_opdef(func)
        return None if operator is None else operator._init_fn
    composite = func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
    return func.decompose if composite else None


def _on_meta(args: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(args))


def _is_view(func: Any) -> bool:
    return func.is_view or func.overloadpacket is torch.ops.aten._unsafe_view


def _only_a_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Reshapes that needed no copy: another shape of the same storage, nothing written."""
    if func._schema.is_mutable or func.namespace != "aten":
        return False  # works in place, on what may be a view
    own = {tensor.untyped_storage()._cdata for tensor in inputs}
    return bool(outputs) and all(
        tensor._is_view() and tensor.untyped_storage()._cdata in own for tensor in outputs
    )


def _keep_layout(func: Any, args: Any, result: Any) -> Any:
    """Convolutions and batch norms keep channels-last on a GPU; the meta device forgets it."""
    place = _IMAGE.get(func.overloadpacket)
    if place is None or not args[place].is_meta:
        return result
    first, *others = result if isinstance(result, tuple) else (result,)
    layout = torch.channels_last
    if first is None or first.ndim != 4 or not args[place].is_contiguous(memory_format=layout):
        return result
    first = torch.empty_like(first, memory_format=layout)
    return (first, *others) if isinstance(result, tuple) else first


_IMAGE = {
    torch.ops.aten.native_batch_norm: 0,
    torch.ops.aten.native_batch_norm_backward: 1,
    torch.ops.aten.convolution: 0,
    torch.ops.aten.convolution_backward: 1,
}
"""Which argument is the picture (B, C, H, W)."""
_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


def _convolution(func: Any, args: Any, result: Any) -> tuple[str, float]:
    """Unit and arithmetic of a convolution; PyTorch's own count forgets the groups backwards.

    Backward costs one convolution for the input's gradient, where wanted, and one for the weight's.
    """
    if func.overloadpacket is torch.ops.aten.convolution:
        image, weight, transposed, output, times = args[0], args[1], args[6], result, 1
    else:
        output, image, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        times = int(wanted[0]) + int(wanted[1])
    places = image.numel() if transposed else output.numel()
    # One channel a group cannot use the matrix units.
    unit = "vector" if weight.shape[1] == 1 else "matmul"
    return unit, times * 2.0 * places * weight[0].numel()
