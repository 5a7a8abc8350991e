"""Which sample comes when: a pure function of (manifest hash, seed, epoch, images seen).

The sequence of an epoch is laid out in *lanes*, one for each place in the global batch. The
samples are cut into chunks (runs of neighbours in one shard), the chunks are shuffled and strung
together, and the string is cut into as many equal lanes as a global batch has places. Step s
takes the s-th sample of every lane. So

- a global batch holds samples of as many different chunks as it has samples (well mixed), while
  each lane, hence each rank, reads its shards in runs of neighbours (kind to network disks);
- the sequence knows nothing of ranks: they share out the places of a step among themselves, and a
  rank's places are the same lanes in every step;
- nothing is stored but the shuffled chunks: any position of any epoch is found by arithmetic.

What does not fill a last global batch (the end of the string, other chunks in every epoch) is
left out of that epoch.

:func:`split` divides a global batch into the micro-batches of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from l2vit.data.config import AugmentConfig
from l2vit.data.rng import derive_key, permutation, uniforms
from l2vit.data.shared_array import SharedArray
from l2vit.errors import ConfigError, UserError

MIN_CHUNKS_PER_LANE = 8
"""Small data: the chunk shrinks until each lane is made of so many, down to single samples."""
_HASHED = 1 << 20
"""Samples of a subset hashed at a time, so that the whole of it is never copied."""
_SHOWN = 8
"""Possible splits listed in an error."""


@dataclass(frozen=True)
class _EpochPlan:
    """The shuffled chunks of one epoch; 16 bytes a chunk."""

    epoch: int
    starts: np.ndarray
    """(chunks,) int64: first sample of each chunk, in reading order."""
    ends: np.ndarray
    """(chunks,) int64: running total of samples after each chunk."""


def locate(images_seen: int, global_batch: int, steps_per_epoch: int) -> tuple[int, int]:
    """(epoch, first position in it) of the step that starts after ``images_seen`` images.

    Raises:
        UserError: not a multiple of the global batch (the run had another one).
    """
    step, rest = divmod(images_seen, global_batch)
    if rest:
        raise UserError(
            f"cannot continue at {images_seen} images: not a multiple of the global batch"
            f" {global_batch}; continue with the global batch the run began with"
        )
    epoch, step = divmod(step, steps_per_epoch)
    return epoch, step * global_batch


def order_chunk(chunk: int, samples: int, global_batch: int) -> int:
    """Samples that an order reads in a run: ``chunk``, or fewer; see ``MIN_CHUNKS_PER_LANE``."""
    return max(1, min(chunk, samples // (MIN_CHUNKS_PER_LANE * global_batch)))


class SampleOrder:
    """The one global order of a run.

    Args:
        manifest_hash: ``Manifest.hash`` of the data.
        shard_samples: samples of each shard, in the manifest's order.
        seed: the run's seed.
        chunk: samples read in a run from one shard, at most; see ``MIN_CHUNKS_PER_LANE``.
        global_batch: images per optimizer step over all ranks.
        subset: sorted sample ids to train on; None for all.

    Raises:
        ConfigError: fewer samples than one global batch.
    """

    def __init__(
        self,
        manifest_hash: str,
        shard_samples: Sequence[int],
        *,
        seed: int,
        chunk: int,
        global_batch: int,
        subset: np.ndarray | None = None,
    ) -> None:
        firsts = np.concatenate([[0], np.cumsum(np.asarray(shard_samples, np.int64))])
        self._shared_subset = None if subset is None else SharedArray(subset)
        # Chunks are cut in the subset's own numbering, at the places where its shards change.
        inside = firsts if subset is None else np.searchsorted(subset, firsts)
        self._shared_firsts = SharedArray(inside)
        self.samples = int(inside[-1])
        self.global_batch = global_batch
        self.steps_per_epoch = self.samples // global_batch
        if not self.steps_per_epoch:
            raise ConfigError(
                f"global_batch: {global_batch} is more than the {self.samples} samples to train on"
            )
        self.chunk = order_chunk(chunk, self.samples, global_batch)
        self._key_parts = (manifest_hash, seed)
        self._plans: dict[int, _EpochPlan] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without the chunks of epochs, which are made again where they are needed."""
        return {**self.__dict__, "_plans": {}}

    @property
    def _subset(self) -> np.ndarray | None:
        return None if self._shared_subset is None else self._shared_subset.values

    @property
    def _firsts(self) -> np.ndarray:
        return self._shared_firsts.values

    @property
    def fingerprint(self) -> str:
        """Equal for equal orders: covers every argument, the samples of a subset too."""
        digest, subset = hashlib.sha256(), self._subset
        for start in range(0, 0 if subset is None else len(subset), _HASHED):
            digest.update(subset[start : start + _HASHED].astype("<i8").tobytes())  # type: ignore[index]
        parts = (*self._key_parts, self.chunk, self.global_batch, digest.hexdigest())
        return f"{derive_key(*parts):016x}"

    def epoch_ids(self, epoch: int) -> np.ndarray:
        """The whole sequence of ``epoch``: (steps_per_epoch · global_batch,) int64 sample ids."""
        return self.ids_at(epoch, np.arange(self.steps_per_epoch * self.global_batch))

    def ids_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample ids (int64) at ``positions`` of the sequence of ``epoch``."""
        plan = self._plan_of(epoch)
        step, lane = np.divmod(np.asarray(positions, np.int64), self.global_batch)
        place = lane * self.steps_per_epoch + step
        at = np.searchsorted(plan.ends, place, side="right")
        before = np.where(at > 0, plan.ends[at - 1], 0)
        index = plan.starts[at] + place - before
        return index if self._subset is None else self._subset[index].astype(np.int64)

    def locate(self, images_seen: int) -> tuple[int, int]:
        """(epoch, first position in it) of the step that starts after ``images_seen`` images.

        Raises:
            UserError: not a multiple of the global batch (the run had another one).
        """
        return locate(images_seen, self.global_batch, self.steps_per_epoch)

    def batch_ids(self, images_seen: int) -> np.ndarray:
        """(global_batch,) int64 ids of the step that starts after ``images_seen`` images."""
        epoch, first = self.locate(images_seen)
        return self.ids_at(epoch, first + np.arange(self.global_batch))

    def following(self, sample_id: int) -> int:
        """The sample after ``sample_id`` in the manifest (of the subset), around the end."""
        if self._subset is None:
            return (sample_id + 1) % self.samples
        at = int(np.searchsorted(self._subset, sample_id, side="right"))
        return int(self._subset[at % self.samples])

    def _plan_of(self, epoch: int) -> _EpochPlan:
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._make_plan(epoch)
            # two are kept: where epochs meet, batches of both are under way
            self._plans = {**dict(list(self._plans.items())[-1:]), epoch: plan}
        return plan

    def _make_plan(self, epoch: int) -> _EpochPlan:
        starts, lengths = self._cut(derive_key("cut", *self._key_parts, epoch))
        order = permutation(derive_key("chunks", *self._key_parts, epoch), len(starts))
        return _EpochPlan(epoch, starts[order], np.cumsum(lengths[order]))

    def _cut(self, key: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the chunks; where a shard is cut is drawn anew each epoch."""
        firsts, chunk = self._firsts[:-1], self.chunk
        sizes = np.diff(self._firsts)
        shift = (uniforms(key, np.arange(len(sizes)), 1)[:, 0] * chunk).astype(np.int64)
        pieces = np.where(sizes > 0, -(-(sizes + shift) // chunk), 0)
        shard = np.repeat(np.arange(len(sizes)), pieces)
        number = np.arange(len(shard)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        inside = np.maximum(number * chunk - shift[shard], 0)
        ends = np.minimum((number + 1) * chunk - shift[shard], sizes[shard])
        return firsts[shard] + inside, ends - inside


@dataclass(frozen=True)
class Share:
    """Which places of each step one rank takes, and in which micro-batches.

    Micro-batch ``a`` of rank ``r`` in a step takes ``micro_batch`` places from
    ``(a · world + r) · micro_batch`` on.
    """

    rank: int
    split: Split

    def places(self, micro_step: int) -> np.ndarray:
        """(micro_batch,) int64 places in the step of the rank's micro-batch ``micro_step``."""
        size = self.split.micro_batch
        return (micro_step * self.split.world + self.rank) * size + np.arange(size)


@dataclass(frozen=True)
class Split:
    """micro_batch × accumulation × world = global batch."""

    micro_batch: int
    """Images per rank and backward pass."""
    accumulation: int
    """Backward passes per optimizer step."""
    world: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world


def split(
    global_batch: int,
    *,
    world: int,
    micro_batch: int = 0,
    multiple_of: int = 1,
    multiple_key: str = "augment.mix_group",
) -> Split:
    """Divide the global batch over ``world`` ranks.

    Args:
        global_batch: images per optimizer step over all ranks.
        world: number of ranks.
        micro_batch: images per rank and backward pass; 0 takes a rank's whole share at once.
        multiple_of: what must divide the micro-batch.
        multiple_key: the setting that says so, for messages.

    Raises:
        ConfigError: no such division; lists the possible ones.
    """
    options = possible(global_batch, world=world, multiple_of=multiple_of)
    if not options:
        ranks = _numbers_of_ranks(global_batch // multiple_of, near=world)
        raise ConfigError(
            f"schedule.global_batch: {global_batch} cannot be divided over {world} ranks in"
            f" micro-batches that are multiples of {multiple_of} ({multiple_key});"
            f" the nearest that can is {_nearest(global_batch, world * multiple_of)},"
            f" the numbers of ranks that can: {ranks}"
        )
    chosen = micro_batch or options[0].micro_batch
    for option in options:
        if option.micro_batch == chosen:
            return option
    listed = ", ".join(f"{o.micro_batch}×{o.accumulation}" for o in options[:_SHOWN])
    more = ", …" if len(options) > _SHOWN else ""
    raise ConfigError(
        f"engine.micro_batch: {micro_batch} does not divide schedule.global_batch={global_batch}"
        f" over {world} ranks; possible micro_batch×accumulation: {listed}{more}"
    )


def possible(global_batch: int, *, world: int, multiple_of: int = 1) -> list[Split]:
    """Every division of the global batch, largest micro-batch first."""
    if global_batch % world:
        return []
    share = global_batch // world
    sizes = [m for m in range(share, 0, -1) if share % m == 0 and m % multiple_of == 0]
    return [Split(m, share // m, world) for m in sizes]


def halve(current: Split, *, multiple_of: int = 1) -> Split | None:
    """The next smaller possible micro-batch, at most half; None when there is none."""
    for option in possible(current.global_batch, world=current.world, multiple_of=multiple_of):
        if 2 * option.micro_batch <= current.micro_batch:
            return option
    return None


def mix_group(augment: AugmentConfig) -> int:
    """What must divide a micro-batch: a mixing group must not span ranks. 1 without mixing."""
    return augment.mix_group if augment.mixup or augment.cutmix else 1


def _numbers_of_ranks(share: int, *, near: int) -> str:
    """What divides ``share``: the numbers up to ``near`` and the next one."""
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    fewer = [n for n in divisors if n <= near]
    shown = fewer[-_SHOWN:] + divisors[len(fewer) : len(fewer) + 1]
    return ", ".join(map(str, shown)) or "none"


def _nearest(number: int, step: int) -> int:
    return max(step, round(number / step) * step)
