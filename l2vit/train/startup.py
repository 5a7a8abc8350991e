"""Start-up of a run: join the other ranks, choose the weights, build the trainer's parts.

Where the first weights come from, in this order: the run directory's own newest sound
checkpoint, ``run.resume``, ``init.source``, scratch. So the same command always continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from l2vit.config import to_tree
from l2vit.data.order import Split, split
from l2vit.data.rng import LATEST_DRAWS
from l2vit.errors import ConfigError, UserError
from l2vit.models.ops import choice
from l2vit.train import (
    checkpoint,
    checks,
    distributed,
    history,
    kernels,
    model,
    param_groups,
    preflight,
    report,
    run_dir,
    run_lock,
    tasks,
    throughput,
)
from l2vit.train.checkpoint import Reader
from l2vit.train.config import TrainConfig
from l2vit.train.denominators import Denominators
from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.guards import StopSignal
from l2vit.train.metrics import Metrics
from l2vit.train.provenance import git_commit, versions
from l2vit.train.run_lock import RunLock
from l2vit.train.saver import Saver
from l2vit.train.schedule import Intervals, Schedule
from l2vit.train.state import TrainState
from l2vit.train.task import Order, Task
from l2vit.train.throughput import PhaseClock, Throughput
from l2vit.train.trainer import Trainer
from l2vit.train.watchdog import Watchdog
from l2vit.train.zero import full_shape

T = TypeVar("T")


def train(config: TrainConfig) -> int:
    """Carry out the run that ``config`` describes, or continue it.

    Every rank calls this. The process group is started and left here.

    Returns:
        Exit status: 0 when the run is finished, ``guards.STOPPED`` (75) when a signal stopped it
        after saving: run the same command again.

    Raises:
        UserError: what a user can mend; the run directory keeps its last checkpoint.
    """
    with open_trainer(config) as trainer:
        if trainer is None:
            if distributed.from_environment().main:
                print(f"{config.run.dir} is finished already", flush=True)
            return 0
        world = trainer.world
        try:
            status = trainer.train()
        except RuntimeError as error:
            if not distributed.is_lost_peer(error):
                raise
            lost = (
                f"rank {world.rank} lost another rank in step {trainer.clock.step}"
                f" ({str(error).splitlines()[0]})"
            )
            _note_failure(trainer, lost)
            raise UserError(f"{lost}; the same command continues the run") from error
        except UserError as error:
            _note_failure(trainer, str(error))
            raise
        report.finish(trainer.directory, trainer.metrics, main=world.main, done=status == 0)
        return status


def _note_failure(trainer: Trainer, why: str) -> None:
    if trainer.world.main:
        history.append(trainer.directory, "failed", step=trainer.state.step, why=why)


@contextlib.contextmanager
def open_trainer(config: TrainConfig) -> Iterator[Trainer | None]:
    """Join the other ranks and build the trainer; None if the run is finished already.

    Raises:
        UserError: what a user can mend, the same on every rank or naming the rank.
    """
    checks.can_be_logged(config)
    stop = StopSignal()
    world = distributed.start(
        distributed.from_environment(),
        timeout_seconds=max(1800.0, 4 * config.faults.hang_seconds),
        run=config.run.dir,
    )
    with contextlib.ExitStack() as ending:  # each is closed even if the one before it fails
        ending.callback(distributed.stop)
        ending.callback(stop.close)
        ending.callback(choice.use_table, None)
        lock = run_lock.hold(Path(config.run.dir), world)
        ending.callback(lock.release)
        directory = run_dir.prepare(config, world)
        preflight.quick(config, world)
        if run_dir.finished(directory, run_dir.length_of(config.schedule)):
            yield None
            return
        clock = PhaseClock()
        trainer = _build(config, world, stop, lock, clock)
        watchdog = Watchdog(clock, world=world, limit=config.faults.hang_seconds)
        parts = (
            trainer.engine,
            trainer.loader,
            trainer.evaluator,
            trainer.saver,
            trainer.metrics,
            watchdog,
        )
        for part in parts:
            ending.callback(part.close)
        yield trainer


def _build(
    config: TrainConfig, world: World, stop: StopSignal, lock: RunLock, clock: PhaseClock
) -> Trainer:
    config = dataclasses.replace(config, run=dataclasses.replace(config.run))
    directory = Path(config.run.dir)
    task = _on_all_ranks(world, lambda: tasks.kind(config.task).make(config))
    reader = _to_continue(config, task, world)
    state = TrainState.from_dict(reader.meta.state) if reader else _fresh_state(config)
    config.run.draws = state.draws  # type: ignore[assignment]
    network = task.network()
    flops = task.flops_per_image(network)
    shares = _split(config, task, network, world)
    if reader is not None:
        _require_same_model(reader, network)
    else:
        _initialise(task, network, directory, world)
    compiled = kernels.settle(
        config.engine,
        network,
        task.trial_loss,
        images=shares.micro_batch,
        directory=directory,
        world=world,
    )
    loader = task.loader(shares, world, images_seen=state.images_seen, directory=directory)
    per_epoch = loader.order.steps_per_epoch
    schedule = Schedule.build(config.schedule, config.optim, steps_per_epoch=per_epoch)
    every = Intervals.build(
        config.schedule, config.eval, config.checkpoint, steps_per_epoch=per_epoch
    )
    evaluator = task.evaluator(world, clock.beat)
    warnings = task.warnings(network) if world.main else []
    reached = run_dir.reached(directory).step if world.main else 0
    settled = dataclasses.replace(config.engine, compile=compiled)
    engine = Engine(network, settled, config.optim, config.ema, world=world, split=shares)
    peak = throughput.peak_tflops(config.log, world.device) * 1e12 * world.size
    trainer = Trainer(
        config=config,
        world=world,
        task=task,
        loader=loader,
        engine=engine,
        schedule=schedule,
        every=every,
        evaluator=evaluator,
        saver=Saver(directory, config.checkpoint, world=world, keep_every=every.keep),
        metrics=Metrics(
            directory,
            main=world.main,
            total_steps=schedule.total,
            resumed_step=state.step,
            sinks=config.log.sinks,
            settings=to_tree(config),
        ),
        throughput=Throughput(clock, shares.global_batch, flops, peak),
        denominators=Denominators(engine.module, world=world),
        stop=stop,
        lock=lock,
        state=state,
    )
    if reader is not None:
        trainer.restore(reader)
    _announce(trainer, reader, warnings)
    if world.main:
        history.append(directory, "start", reached=reached, **_facts(trainer, reader))
    trainer.throughput.mark(time.monotonic(), trainer.state.step)
    return trainer


def _fresh_state(config: TrainConfig) -> TrainState:
    return TrainState(seed=config.run.seed, draws=config.run.draws or LATEST_DRAWS)


def _on_all_ranks(world: World, action: Callable[[], T]) -> T:
    """What ``action`` gives; if it fails on one rank, every rank raises."""
    problem: UserError | None = None
    results = []
    try:
        results.append(action())
    except UserError as error:
        problem = error
    world.raise_on_all_ranks(problem)
    return results[0]


def _split(config: TrainConfig, task: Task[Any], network: nn.Module, world: World) -> Split:
    """Micro-batch and accumulation: as configured, smaller where memory would not suffice."""
    shares = split(
        config.schedule.global_batch,
        world=world.size,
        micro_batch=config.engine.micro_batch,
        multiple_of=task.batch_multiple,
        multiple_key=task.batch_multiple_key,
    )
    if not (config.engine.auto_micro_batch and model.probes_memory(world)):
        return shares
    return model.fit_micro_batch(
        network,
        task.trial_loss,
        shares,
        world=world,
        engine=config.engine,
        averages=config.ema.decay > 0,
        multiple_of=task.batch_multiple,
    )


def _initialise(task: Task[Any], network: nn.Module, directory: Path, world: World) -> None:
    def load() -> None:
        report = task.initialise(network)
        if report is not None and world.main:
            report.save(directory)
            print(report.summary(), flush=True)

    _on_all_ranks(world, load)


# -- continuing


def _to_continue(config: TrainConfig, task: Task[Any], world: World) -> Reader | None:
    """The checkpoint to continue from: the run's own, else that of ``run.resume``, else None.

    Raises:
        UserError: it was trained on other classes or data.
        ConfigError: it was trained with another seed or global batch.
    """
    reader = run_dir.newest_sound(Path(config.run.dir), world)
    if reader is None and config.run.resume:
        reader = Reader(checkpoint.find(Path(config.run.resume)))
        world.raise_on_all_ranks(run_dir.verified(reader, world))
    if reader is not None:
        _require_same_data(reader, task)
        _require_same_settings(reader, config)
    return reader


def _require_same_data(reader: Reader, task: Task[Any]) -> None:
    if reader.meta.class_hash != task.data.class_hash:
        raise UserError(
            f"{reader.directory} was trained on other classes than {task.data.where}; to start"
            " from its weights set init.source instead, with a fresh run.dir"
        )
    if reader.meta.manifest_hash != task.data.manifest_hash:
        raise UserError(
            f"{reader.directory} was trained on other data than {task.data.where}: its order of"
            " samples cannot be continued; restore the data or start with a fresh run.dir"
        )


def _require_same_settings(reader: Reader, config: TrainConfig) -> None:
    batch = reader.meta.config["schedule"]["global_batch"]
    draws = TrainState.from_dict(reader.meta.state).draws
    for key, then, now in (
        ("run.seed", reader.meta.state.get("seed"), config.run.seed),
        ("run.draws", draws, config.run.draws or draws),
        ("schedule.global_batch", batch, config.schedule.global_batch),
    ):
        if then != now:
            raise ConfigError(
                f"{key}: {reader.directory} was trained with {then}, the configuration says {now};"
                " continue with the same value or use a fresh run.dir"
            )


def _require_same_model(reader: Reader, network: nn.Module) -> None:
    """Check that the checkpoint holds this model's parameters, in these shapes.

    Raises:
        UserError: names the first that differs.
    """
    wanted = {f"param/{name}": full_shape(p) for name, p in network.named_parameters()}
    held = {k: tuple(e["shape"]) for k, e in reader.tensors.items() if k.startswith("param/")}
    for key in sorted(wanted.keys() | held.keys()):
        if wanted.get(key) != held.get(key):
            raise UserError(
                f"{reader.directory} is a checkpoint of another model: {key} has shape"
                f" {held.get(key, 'none')}, the configured model needs {wanted.get(key, 'none')};"
                " mend model.* or use a fresh run.dir"
            )


# -- the first lines


def _announce(trainer: Trainer, reader: Reader | None, warnings: list[str]) -> None:
    config, split, schedule = trainer.config, trainer.engine.split, trainer.schedule
    order, say = trainer.loader.order, trainer.metrics.say
    parameters = sum(group.numel for group in trainer.engine.groups)
    lines = [
        f"{config.model.name}: {parameters / 1e6:.3f} M parameters,"
        f" {trainer.throughput.flops_per_image / 6e9:.3f} G multiply-adds an image",
        f"{trainer.world.size} ranks on {trainer.world.device.type},"
        f" ZeRO-{config.engine.zero_stage}, {config.engine.precision};"
        f" global batch {split.global_batch} ="
        f" {split.micro_batch} × {split.accumulation} × {split.world}",
        f"{schedule.total:,} steps, {order.steps_per_epoch:,} an epoch,"
        f" warm-up {schedule.warmup:,}",
        _left_out(order) if trainer.task.exact_order else "samples come from a stream",
        _rates(config, schedule),
        param_groups.table(
            trainer.engine.groups, lr=schedule.peak, weight_decay=config.optim.weight_decay
        ),
    ]
    if reader is not None:
        lines.append(f"continuing from {reader.directory} at step {trainer.state.step:,}")
    say("\n".join(lines))
    if trainer.state.order not in ("", order.fingerprint) and trainer.task.exact_order:
        say(
            "data.chunk or the samples of data.subset are others than before: what is left of this"
            " epoch may repeat samples and miss some; the next ones are whole",
            warn=True,
        )
    for warning in [*warnings, *_unscaled_rate(config)]:
        say(warning, warn=True)


def _facts(trainer: Trainer, reader: Reader | None) -> dict[str, Any]:
    """What this start of the run is, for its report."""
    config, world, split = trainer.config, trainer.world, trainer.engine.split
    data, device = trainer.task.data, world.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "step": trainer.state.step,
        "weights": str(reader.directory) if reader else config.init.source or "scratch",
        "parameters": sum(group.numel for group in trainer.engine.groups),
        "multiply_adds_per_image": trainer.throughput.flops_per_image / 6,
        "samples": trainer.loader.order.samples,
        "classes": len(data.classes),
        "data": data.where,
        "dataset": data.provenance.get("dataset", ""),
        "headline": trainer.task.headline,
        "ranks": world.size,
        "ranks_per_node": world.local_size,
        "device": gpu,
        "host": socket.gethostname(),
        "micro_batch": split.micro_batch,
        "accumulation": split.accumulation,
        "steps": trainer.schedule.total,
        "steps_per_epoch": trainer.loader.order.steps_per_epoch,
        "warmup_steps": trainer.schedule.warmup,
        "peak_learning_rate": trainer.schedule.peak,
        "command": [os.path.relpath(sys.argv[0]), *sys.argv[1:]],
        "commit": git_commit(),
        "versions": versions(),
    }


def _rates(config: TrainConfig, schedule: Schedule) -> str:
    optim, batch = config.optim, config.schedule.global_batch
    peak = f"learning rate {schedule.peak:.3g} at its peak"
    if not optim.lr_batch:
        return f"{peak}, as given"
    return f"{peak}: {optim.lr:g} for batches of {optim.lr_batch} × √({batch} / {optim.lr_batch})"


def _unscaled_rate(config: TrainConfig) -> list[str]:
    """Warn where the recipe's rate was chosen for a batch four times larger or smaller."""
    optim, batch, recipe = config.optim, config.schedule.global_batch, config.about.recipe_batch
    if optim.lr_batch or not recipe or 1 / 4 < batch / recipe < 4:
        return []
    scaled = optim.lr * (batch / recipe) ** 0.5
    return [
        f"optim.lr={optim.lr:g} is the recipe's rate for batches of {recipe}, this run's have"
        f" {batch}: set optim.lr_batch={recipe} to scale it (to {scaled:.3g}), or optim.lr"
    ]


def _left_out(order: Order) -> str:
    """What an epoch drops or repeats: never silently."""
    rest = order.samples - order.steps_per_epoch * order.global_batch
    every = f"{order.samples:,} samples, each once an epoch"
    if rest < 0:
        return every + f", and {-rest:,} of them again to fill the last batch"
    return every + (f", but for {rest:,} left out, other ones in each" if rest else "")
