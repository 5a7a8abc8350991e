"""The sum of gradients over the ranks at ZeRO-1 in bf16: in place, and overlapped if asked for.

DeepSpeed packs all fp32 gradients into one more tensor when the backward pass is over, sums it over
the ranks and copies it back. Here the ranges of the flat gradients are summed where they lie. With
overlap they are cut into buckets, and a bucket is summed as soon as the last micro-batch's backward
pass has made its gradients, while that pass goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from l2vit.train.distributed import wait_for_ranks
from l2vit.train.zero_foreach import Gradients, Place

BUCKET = 25_000_000
"""Elements of a bucket, where the configuration states none."""


@dataclass
class _Bucket:
    """Neighbours in one flat gradient."""

    places: list[Place]
    sums: Tensor
    """The run of the flat fp32 gradient that holds theirs."""
    group: Any
    missing: set[Place] = field(default_factory=set)
    """Weights whose gradient this backward pass has not made yet."""
    work: Any = None
    """The sum over the ranks, once it has begun."""


class Reduction:
    """Takes the place of DeepSpeed's all-reduce after the backward pass."""

    def __init__(self, engine: Any, gradients: Gradients, *, bucket: int, overlap: bool) -> None:
        """Take over in ``engine`` (DeepSpeed's), whose optimizer has ``gradients``.

        Args:
            bucket: elements summed at once, 0 for the usual number; all ranks alike.
            overlap: begin during the backward pass.
        """
        self._engine, self._gradients = engine, gradients
        largest = (bucket or BUCKET) if overlap else None
        weights = gradients.weights
        order = {id(p): number for number, p in enumerate(engine.module.parameters())}
        # A backward pass comes to a network's first weights last, so a bucket is whole when its
        # first weight's gradient is. All ranks must begin the sums in the same order.
        self._buckets = sorted(
            _buckets(engine.optimizer, largest),
            key=lambda found: -min(order[id(weights[place])] for place in found.places),
        )
        self._begun = 0
        self._hooks = list(self._watch()) if overlap else []
        self._expect()
        engine.buffered_allreduce_fallback = self._finish

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self) -> Iterator[Any]:
        for bucket in self._buckets:
            for place in bucket.places:
                weight = self._gradients.weights[place]
                yield weight.register_post_accumulate_grad_hook(self._noting(bucket, place))

    def _noting(self, bucket: _Bucket, place: Place) -> Callable[[Tensor], None]:
        def note(weight: Tensor) -> None:
            if not self._engine.is_gradient_accumulation_boundary():
                return
            if bucket.work is not None:
                raise RuntimeError(
                    "a weight's gradient came after its bucket was summed over the ranks, as with"
                    " reentrant checkpointing of shared layers; set engine.overlap=false"
                )
            bucket.missing.discard(place)
            self._begin_whole()

        return note

    def _begin_whole(self) -> None:
        """Begin the sums of the buckets that are whole and whose turn it is."""
        while self._begun < len(self._buckets) and not self._buckets[self._begun].missing:
            bucket = self._buckets[self._begun]
            self._gradients.add(bucket.places)
            self._begin(bucket)

    @torch.no_grad()
    def _begin(self, bucket: _Bucket) -> None:
        self._gradients.settle(bucket.places)
        ranks = dist.get_world_size(bucket.group)
        if ranks > 1:
            bucket.sums.mul_(1 / ranks)
        bucket.work = dist.all_reduce(bucket.sums, group=bucket.group, async_op=True)
        self._begun += 1

    def _finish(self, grads: None = None, elements_per_buffer: int = 0) -> None:
        """Sum what has not been begun, and wait; on a GPU only its stream waits."""
        for bucket in self._buckets[self._begun :]:
            self._begin(bucket)
        for bucket in self._buckets:
            wait_for_ranks(bucket.work.wait)
        self._expect()

    def _expect(self) -> None:
        self._begun = 0
        for bucket in self._buckets:
            bucket.work, bucket.missing = None, set(bucket.places)


def _buckets(optimizer: Any, largest: int | None) -> Iterator[_Bucket]:
    """The flat gradients in runs of about ``largest`` elements; whole for None."""
    for group, weights in enumerate(optimizer.bf16_groups):
        flat = optimizer.fp32_groups_gradients_flat[group]
        ranks = optimizer.real_dp_process_group[group]
        places: list[Place] = []
        begin = end = 0
        for number, weight in enumerate(weights):
            places.append((group, number))
            end += weight.numel()
            full = largest is not None and end - begin >= largest
            if full or number == len(weights) - 1:
                yield _Bucket(places, flat.narrow(0, begin, end - begin), ranks)
                places, begin = [], end
