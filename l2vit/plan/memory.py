"""Memory of one rank, by ZeRO stage, as ``l2vit.train.engine`` sets DeepSpeed up."""

from __future__ import annotations

from dataclasses import dataclass

MASTER, MOMENTS, ACCUMULATOR = 4, 8, 4
"""Bytes a weight: fp32 master, two fp32 moments, fp32 accumulated gradient."""
COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    """In the compute dtype; at stage 3 the gathered ones, too."""
    gradients: float
    """As the backward pass makes them, the fp32 accumulator, and the bucket they travel in."""
    optimizer: float
    """Masters and moments, and the moving average where there is one."""
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def per_rank(
    parameters: int,
    *,
    stage: int,
    ranks: int,
    precision: str,
    bucket: int,
    ema: bool = False,
    activations: float = 0.0,
) -> Memory:
    """Memory of one of ``ranks`` ranks.

    Args:
        parameters: of the whole model.
        stage: 1 shares out the optimizer's state, 2 also the gradients, 3 also the weights.
        ranks: in all.
        precision: of ``EngineConfig``.
        bucket: elements of DeepSpeed's gradient bucket; stages 2 and 3 allocate it whole.
        ema: an fp32 moving average is kept (shared out like the masters).
        activations: peak bytes of a micro-batch, ``Trace.peak_bytes``.
    """
    compute = COMPUTE_BYTES[precision]
    share = parameters / ranks
    state = share * (MASTER + MOMENTS + (MASTER if ema else 0))
    if stage == 1:
        made = compute if compute < ACCUMULATOR else 0  # fp32 gradients are the accumulator
        weights, gradients = float(compute * parameters), float((ACCUMULATOR + made) * parameters)
    else:
        weights = compute * (parameters if stage == 2 else parameters + share)
        # Stage 3 stages gradients in the accumulator's dtype, stage 2 in the compute dtype.
        gradients = ACCUMULATOR * share + (compute if stage == 2 else ACCUMULATOR) * bucket
    return Memory(weights, gradients, state, activations)


def checkpoint_bytes(parameters: int, *, buffers: int = 0, ema: bool = False) -> int:
    """Bytes of one checkpoint: fp32 weights, both moments, the average, buffers."""
    return 4 * (parameters * (4 if ema else 3) + buffers * (2 if ema else 1))
