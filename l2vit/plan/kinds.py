"""Sorts operators into the kinds that a ledger's table shows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

COPIES = "layout copies"
ALLOCATION = "allocation"
WITHIN = "allocation inside"
"""Inside an operator of ours: host time and no launch, as PyTorch's operators allocate unseen."""
_KINDS = {
    "linear layers": "mm addmm bmm baddbmm",
    "convolutions": "convolution convolution_backward",
    "layer norm": "native_layer_norm native_layer_norm_backward",
    "batch norm": "native_batch_norm native_batch_norm_backward",
    "activations": "gelu gelu_backward relu threshold_backward",
    "sums": "sum mean cumsum",
    "casts": "_to_copy",
    COPIES: "clone cat stack",
    "random numbers": "bernoulli_ normal_ uniform_",
    "gathers": "index index_put_ _index_put_impl_ gather scatter_ scatter_add_ index_select",
    ALLOCATION: "empty empty_like empty_strided new_empty new_empty_strided",
    "optimizer": "_fused_adamw_ _foreach_lerp_ _foreach_addcdiv_ _foreach_addcmul_",
    "gradient norm": "linalg_vector_norm _foreach_norm",
    "all-reduce": "allreduce_ all_reduce",
}
_BY_NAME = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def kind_of(name: str, tensors: Sequence[Tensor]) -> str:
    """The kind of the operator ``name`` that read and wrote ``tensors``."""
    if name in ("copy_", "_foreach_copy_"):
        return COPIES if len({tensor.dtype for tensor in tensors}) == 1 else "casts"
    return _BY_NAME.get(name, "elementwise")
