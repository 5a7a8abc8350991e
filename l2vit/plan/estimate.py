"""Time, memory and disk of a run on a given cluster: a prediction from stated figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from l2vit.data.order import Split, mix_group, possible, split
from l2vit.errors import ConfigError
from l2vit.plan import memory
from l2vit.plan.devices import Device
from l2vit.plan.memory import Memory
from l2vit.plan.recorder import Operation
from l2vit.plan.trace import Trace, trace
from l2vit.train import model
from l2vit.train.config import TrainConfig
from l2vit.train.engine import deepspeed_config
from l2vit.train.precision import DTYPES
from l2vit.train.schedule import Schedule, interval_of

STAGES = (1, 2, 3)
COLLECTIVE_US = 20.0
"""Time of one collective operation between two nodes before the first byte; times log2(ranks)."""

ENGINE_CALLS, ACCUMULATE_CALLS = 39, 20
"""Operators of DeepSpeed in a step, and for each further micro-batch (``benchmarks/ledger.py``)."""
ENGINE_BYTES, ACCUMULATE_BYTES, OPTIMIZER_BYTES = 20.0, 14.0, 16.0
"""A weight: of each step, of each further micro-batch, and of the optimizer, which ranks share."""


@dataclass(frozen=True)
class Cluster:
    """What one trains on."""

    device: Device
    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)

    @property
    def bus_gbs(self) -> float:
        """Bandwidth of a ring over all ranks: of the node, or of its network cards if slower."""
        device = self.device
        if self.nodes == 1:
            return device.node_gbs * device.network_share
        return min(device.node_gbs, device.network_gbs * self.per_node) * device.network_share


@dataclass(frozen=True)
class Work:
    """What there is to do."""

    images: int
    classes: int
    val_images: int = 0
    bytes_per_image: float = 110e3
    """Mean size of a file; 110 kB is ImageNet's."""


@dataclass(frozen=True)
class Estimate:
    """A run, predicted. Times are seconds."""

    config: TrainConfig
    cluster: Cluster
    work: Work
    split: Split
    schedule: Schedule
    steps_per_epoch: int
    trace: Trace
    compute: float
    """Forward and backward passes and the optimizer, a step."""
    communication: float
    data: float
    """Loading a step's images at the stated rate; goes on while the device computes."""
    evaluation: float
    """All evaluations of the run together."""
    memories: dict[int, Memory]
    """By ZeRO stage."""
    checkpoint_bytes: int
    checkpoints_kept: int

    @property
    def step(self) -> float:
        """As if no communication were overlapped with computing; loading is."""
        return max(self.compute + self.communication, self.data)

    @property
    def binding(self) -> str:
        """What limits the speed."""
        if self.data > self.compute + self.communication:
            return "data"
        return "compute" if self.compute >= self.communication else "communication"

    @property
    def seconds(self) -> float:
        return self.step * self.schedule.total + self.evaluation

    @property
    def images_per_second(self) -> float:
        return self.split.global_batch / self.step

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.cluster.ranks

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return (
            self.trace.flops
            / self.split.micro_batch
            * self.split.global_batch
            * (self.schedule.total)
        )

    @property
    def mfu(self) -> float:
        """Share of the peak the whole step reaches."""
        peak = self.cluster.device.matmul_tflops * 1e12 * self.cluster.ranks
        return self.flops / self.schedule.total / self.step / peak


def estimate(config: TrainConfig, cluster: Cluster, work: Work) -> Estimate:
    """Predict the run of ``config`` over ``work`` on ``cluster``.

    Raises:
        ConfigError: the global batch cannot be divided so, or nothing fits into memory.
    """
    steps_per_epoch = work.images // config.schedule.global_batch
    if not steps_per_epoch:
        raise ConfigError(
            f"schedule.global_batch: {config.schedule.global_batch} is more than the"
            f" {work.images} images to train on"
        )
    schedule = Schedule.build(config.schedule, config.optim, steps_per_epoch=steps_per_epoch)
    tracer = _tracer(config, work.classes)
    split = _choose(config, cluster, tracer)
    traced = tracer(split.micro_batch, True)
    memories = {s: _memory(config, cluster, traced, stage=s) for s in STAGES}
    return Estimate(
        config=config,
        cluster=cluster,
        work=work,
        split=split,
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        trace=traced,
        compute=_compute(traced, split, cluster),
        communication=communication(config, cluster, traced.parameters, split.accumulation),
        data=split.global_batch / (cluster.device.images_per_second * cluster.ranks),
        evaluation=_evaluation(config, cluster, work, schedule, steps_per_epoch, tracer),
        memories=memories,
        checkpoint_bytes=memory.checkpoint_bytes(traced.parameters, ema=bool(config.ema.decay)),
        checkpoints_kept=_kept(config, schedule, steps_per_epoch),
    )


def _compute(traced: Trace, split: Split, cluster: Cluster) -> float:
    """Seconds of a step's passes, of DeepSpeed's own operators and of the optimizer."""
    operations = Counter({op: n * split.accumulation for op, n in traced.operations.items()})
    operations += engine_operations(traced, split.accumulation, cluster.ranks)
    return cluster.device.seconds(operations, low_precision=traced.low_precision)


def engine_operations(traced: Trace, accumulation: int, ranks: int) -> Counter[Operation]:
    """DeepSpeed's operators in a step, in number and bytes as its ledger at stage 1 has them."""
    further = accumulation - 1
    calls = ENGINE_CALLS + ACCUMULATE_CALLS * further
    moved = ENGINE_BYTES + ACCUMULATE_BYTES * further + OPTIMIZER_BYTES / ranks
    moved *= traced.parameters
    return Counter({Operation("engine", "engine", bytes=moved / calls): calls})


def communication(
    config: TrainConfig, cluster: Cluster, parameters: int, accumulation: int
) -> float:
    """Seconds a step's collectives take on a ring (gradients travel in fp32).

    Stage 1 reduces once a step; 2 and 3 once a micro-batch; 3 also gathers the weights for each
    forward and each backward pass.
    """
    if cluster.ranks == 1:
        return 0.0
    around = (cluster.ranks - 1) / cluster.ranks * parameters
    compute = memory.COMPUTE_BYTES[config.engine.precision]
    reduce, gather = 4 * around, compute * around
    stage = config.engine.zero_stage
    if stage == 1:
        moved, calls = 2 * reduce + gather, 3
    elif stage == 2:
        moved, calls = accumulation * reduce + gather, accumulation + 1
    else:
        moved, calls = accumulation * (reduce + 2 * gather), 3 * accumulation
    waiting = calls * COLLECTIVE_US * 1e-6 * (cluster.ranks - 1).bit_length()
    return moved / (cluster.bus_gbs * 1e9) + waiting


Tracer = Callable[[int, bool], Trace]


def _tracer(config: TrainConfig, classes: int) -> Tracer:
    """A function of (images, backward) that traces the run's model."""

    def run(images: int, backward: bool) -> Trace:
        return trace(
            lambda: model.from_config(config, classes=classes),
            batch=images,
            input_size=config.data.input_size,
            classes=classes,
            dtype=DTYPES[config.engine.precision],
            backward=backward,
        )

    return run


def _choose(config: TrainConfig, cluster: Cluster, tracer: Tracer) -> Split:
    """The configured micro-batch, or the largest that fits into the device."""
    options: dict[str, Any] = {"world": cluster.ranks, "multiple_of": mix_group(config.augment)}
    batch = config.schedule.global_batch
    if config.engine.micro_batch:
        return split(batch, micro_batch=config.engine.micro_batch, **options)
    largest = split(batch, **options)
    few, more = tracer(2, True), tracer(4, True)
    an_image = (more.peak_bytes - few.peak_bytes) / 2
    state = _memory(config, cluster, few).total - few.peak_bytes
    room = cluster.device.room_gib * 2**30 - state - few.peak_bytes
    for option in possible(batch, **options):
        if (option.micro_batch - 2) * an_image <= room:
            return option
    raise ConfigError(
        f"a micro-batch of {mix_group(config.augment)} images does not fit into"
        f" {cluster.device.room_gib:g} GiB (largest asked for: {largest.micro_batch});"
        " raise engine.zero_stage or set engine.grad_checkpointing=true"
    )


def _memory(
    config: TrainConfig, cluster: Cluster, traced: Trace, *, stage: int | None = None
) -> Memory:
    split = Split(1, 1, cluster.ranks)
    settings = deepspeed_config(config.engine, config.optim, split, parameters=traced.parameters)
    return memory.per_rank(
        traced.parameters,
        stage=stage or config.engine.zero_stage,
        ranks=cluster.ranks,
        precision=config.engine.precision,
        ema=bool(config.ema.decay),
        activations=traced.peak_bytes,
        bucket=settings["zero_optimization"]["reduce_bucket_size"],
    )


def _evaluation(
    config: TrainConfig,
    cluster: Cluster,
    work: Work,
    schedule: Schedule,
    steps_per_epoch: int,
    tracer: Tracer,
) -> float:
    batch = config.schedule.global_batch
    every = interval_of(config.eval.every, "eval.every", steps_per_epoch, batch)
    if not (every and work.val_images):
        return 0.0
    forward = tracer(config.eval.batch, False).seconds(cluster.device) / config.eval.batch
    an_image = max(forward, 1 / cluster.device.images_per_second) / cluster.ranks
    return schedule.total / every * work.val_images * an_image


def _kept(config: TrainConfig, schedule: Schedule, steps_per_epoch: int) -> int:
    """Checkpoints on disk at the end, the best one and one being written included."""
    batch, settings = config.schedule.global_batch, config.checkpoint
    for_good = interval_of(settings.keep_every, "checkpoint.keep_every", steps_per_epoch, batch)
    return settings.keep_last + 2 + (schedule.total // for_good if for_good else 0)


def gib(count: float) -> float:
    """Bytes as GiB."""
    return count / 2**30
