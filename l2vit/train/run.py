"""A run: everything the loop works with, put together and taken apart.

Where the first weights come from, in this order: the run directory's own newest sound
checkpoint, ``run.resume``, ``init.source``, scratch. So the same command always continues.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l2vit import files
from l2vit.config import dump, to_tree
from l2vit.data.bad_samples import LOG_NAME
from l2vit.data.manifest import Manifest
from l2vit.data.order import Split, mix_group, split
from l2vit.data.shards import ShardReader
from l2vit.errors import ConfigError, UserError
from l2vit.train import checkpoint, distributed, model, param_groups, preflight, throughput
from l2vit.train.checkpoint import CheckpointMeta, Reader
from l2vit.train.config import TrainConfig
from l2vit.train.denominators import Denominators
from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.evaluation import Evaluator
from l2vit.train.guards import MicroBatch, StopSignal
from l2vit.train.metrics import Metrics
from l2vit.train.provenance import git_commit, versions
from l2vit.train.resume import changed_settings, check_same_model, to_continue
from l2vit.train.saver import Saver
from l2vit.train.schedule import Schedule, interval_of, steps_of
from l2vit.train.state import TrainState
from l2vit.train.throughput import PhaseClock
from l2vit.train.watchdog import Watchdog

CONFIG_NAME = "config.yaml"
DONE_NAME = "DONE"


@dataclass
class Intervals:
    """In steps; 0 means never."""

    evaluate: int
    save: int
    keep: int

    @classmethod
    def build(cls, config: TrainConfig, steps_per_epoch: int) -> Intervals:
        """From the durations in ``config``."""
        batch = config.schedule.global_batch
        return cls(
            interval_of(config.eval.every, "eval.every", steps_per_epoch, batch),
            interval_of(config.checkpoint.every, "checkpoint.every", steps_per_epoch, batch),
            interval_of(
                config.checkpoint.keep_every, "checkpoint.keep_every", steps_per_epoch, batch
            ),
        )


@dataclass
class Run:
    """The parts of a running training; ``open_run`` makes one."""

    config: TrainConfig
    world: World
    directory: Path
    manifest: Manifest
    schedule: Schedule
    every: Intervals
    steps_per_epoch: int
    mix_until: int
    """Step from which mixup and cutmix are off."""
    state: TrainState
    engine: Engine
    loader: Any
    mixer: Any
    evaluator: Evaluator
    saver: Saver
    metrics: Metrics
    clock: PhaseClock
    watchdog: Watchdog
    stop: StopSignal
    pace: throughput.Pace
    denominators: Denominators
    micro: list[MicroBatch]
    """The micro-batches of the step under way."""
    began: float
    key_of: Any
    """Sample id to a key a person can find the sample by."""

    def seed_step(self, micro_step: int) -> None:
        """Make drop path a pure function of (seed, step, place of the micro-batch in the step)."""
        place = micro_step * self.world.size + self.world.rank
        words = np.random.SeedSequence([self.config.run.seed, self.state.step, place])
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))

    def meta(self) -> CheckpointMeta:
        """What a checkpoint saved now says about itself."""
        self.state.applied_steps = self.engine.applied_steps
        self.state.loss_scaler = self.engine.loss_scaler
        self.state.order = self.loader.order.fingerprint
        self.state.seconds += time.monotonic() - self.began
        self.began = time.monotonic()
        return CheckpointMeta(
            step=self.state.step,
            epoch=self.state.images_seen // (self.steps_per_epoch * self.global_batch),
            images_seen=self.state.images_seen,
            config=to_tree(self.config),
            classes=self.manifest.classes,
            class_names=self.manifest.class_names,
            class_hash=self.manifest.class_hash,
            manifest_hash=self.manifest.hash,
            data={"dataset": self.manifest.dataset, **self.manifest.provenance},
            git_commit=git_commit(),
            versions=versions(),
            metrics=dict(self.state.metrics),
            has_ema=self.engine.ema is not None,
            state=self.state.to_dict(),
        )

    @property
    def global_batch(self) -> int:
        return self.config.schedule.global_batch

    def restore(self, reader: Reader) -> None:
        """Take weights, moments, average and counters from a checkpoint."""
        check_same_model(reader, self.engine.module)
        self.engine.load(reader.read, ema=reader.meta.has_ema)
        self.state = TrainState.from_dict(reader.meta.state)
        self.engine.applied_steps = self.state.applied_steps
        self.engine.loss_scaler = self.state.loss_scaler


@contextlib.contextmanager
def open_run(config: TrainConfig) -> Iterator[Run | None]:
    """Join the other ranks and put a run together; None if it is finished already.

    Raises:
        UserError: what a user can mend, the same on every rank or naming the rank.
    """
    stop = StopSignal()
    world = distributed.start(
        distributed.from_environment(),
        timeout_seconds=max(1800.0, 4 * config.faults.hang_seconds),
        run=config.run.dir,
    )
    with contextlib.ExitStack() as ending:  # each is closed whatever became of the one before
        ending.callback(distributed.stop)
        ending.callback(stop.close)
        directory = _prepare_directory(config, world)
        preflight.quick(config, world)
        run = None
        if not _finished(directory, config):
            run = _assemble(config, world, directory, stop)
            for part in (run.engine, run.loader, run.evaluator, run.metrics, run.watchdog):
                ending.callback(part.close)
        yield run


def _prepare_directory(config: TrainConfig, world: World) -> Path:
    directory = Path(config.run.dir)
    problem: UserError | None = None
    if world.main:
        try:
            (directory / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
            if (directory / DONE_NAME).is_file() or checkpoint.complete_steps(directory):
                for change in changed_settings(directory / CONFIG_NAME, config):
                    print(f"continuing with another setting: {change}", flush=True)
            files.write_text(directory / CONFIG_NAME, dump(config))
            for step in checkpoint.torn_steps(directory):
                print(
                    f"warning: the save of step {step} was interrupted; deleting its remains",
                    file=sys.stderr,
                )
                checkpoint.remove(checkpoint.step_directory(directory, step))
        except OSError as error:
            problem = UserError(f"run.dir: cannot write to {directory}: {error.strerror}")
        except UserError as error:
            problem = error
    world.raise_on_all_ranks(problem)
    return directory


def _finished(directory: Path, config: TrainConfig) -> bool:
    """Whether DONE says the run ended as configured; a longer ``schedule.length`` goes on."""
    path = directory / DONE_NAME
    if not path.is_file():
        return False
    done = files.read_json(path, what="completion marker")
    return bool(done.get("length") == _length(config))


def _length(config: TrainConfig) -> list[str]:
    return [config.schedule.length, config.schedule.cooldown]


def write_done(run: Run) -> None:
    """Mark the run as finished."""
    if run.world.main:
        done = {
            "step": run.state.step,
            "images_seen": run.state.images_seen,
            "length": _length(run.config),
            "metrics": run.state.metrics,
        }
        files.write_json(run.directory / DONE_NAME, done)


def _assemble(config: TrainConfig, world: World, directory: Path, stop: StopSignal) -> Run:
    began = time.monotonic()
    clock = PhaseClock()
    manifest = _load_manifest(config, world)
    reader = to_continue(config, world, directory, manifest)
    state = TrainState.from_dict(reader.meta.state) if reader else TrainState(seed=config.run.seed)
    shares = split(
        config.schedule.global_batch,
        world=world.size,
        micro_batch=config.engine.micro_batch,
        multiple_of=mix_group(config.augment),
    )
    network = model.create(config, classes=len(manifest.classes))
    flops = 6 * _macs(network, config.data.input_size)
    if config.engine.auto_micro_batch and model.probes_memory(world):
        shares = model.fit_micro_batch(
            network, config, shares, world=world, classes=len(manifest.classes)
        )
    if reader is not None:
        check_same_model(reader, network)
    elif config.init.source:
        _initialise(network, config, world, manifest, directory)
    loader, mixer = _data(config, world, manifest, shares, state, directory)
    per_epoch = loader.order.steps_per_epoch
    schedule = Schedule.build(config.schedule, config.optim, steps_per_epoch=per_epoch)
    every = Intervals.build(config, per_epoch)
    evaluator = Evaluator(config, manifest, world=world, beat=clock.beat)
    engine = Engine(network, config, world=world, split=shares)
    metrics = Metrics(
        directory, main=world.main, total_steps=schedule.total, resumed_step=state.step
    )
    peak = throughput.peak_tflops(config.log, world.device) * 1e12 * world.size
    run = Run(
        config=config,
        world=world,
        directory=directory,
        manifest=manifest,
        schedule=schedule,
        every=every,
        steps_per_epoch=per_epoch,
        mix_until=_mix_until(config, schedule, per_epoch),
        state=state,
        engine=engine,
        loader=loader,
        mixer=mixer,
        evaluator=evaluator,
        saver=Saver(directory, config.checkpoint, world=world, keep_every=every.keep),
        metrics=metrics,
        clock=clock,
        watchdog=Watchdog(clock, world=world, limit=config.faults.hang_seconds),
        stop=stop,
        pace=throughput.Pace(clock, config.schedule.global_batch, flops, peak),
        denominators=Denominators(engine.module, world=world),
        micro=[],
        began=began,
        key_of=ShardReader(Path(config.data.train), manifest).key_of,
    )
    if reader is not None:
        run.restore(reader)
    _announce(run, reader)
    run.pace.mark(time.monotonic(), run.state.step)
    return run


def _load_manifest(config: TrainConfig, world: World) -> Manifest:
    if not config.data.train:
        raise ConfigError("data.train is required: the directory of shards to train on")
    problem: UserError | None = None
    manifest: Manifest | None = None
    try:
        manifest = Manifest.of_training(config.data)
    except UserError as error:
        problem = error
    world.raise_on_all_ranks(problem)
    assert manifest is not None
    return manifest


def _data(
    config: TrainConfig,
    world: World,
    manifest: Manifest,
    split: Split,
    state: TrainState,
    directory: Path,
) -> tuple[Any, Any]:
    from l2vit.data.loader import train_loader
    from l2vit.data.mixup import Mixer

    loader = train_loader(
        config.data,
        config.augment,
        manifest=manifest,
        split=split,
        rank=world.rank,
        seed=config.run.seed,
        device=world.device,
        images_seen=state.images_seen,
        bad_samples_log=directory / LOG_NAME,
    )
    mixer = Mixer(config.augment, num_classes=len(manifest.classes), seed=config.run.seed)
    return loader, mixer


def _mix_until(config: TrainConfig, schedule: Schedule, steps_per_epoch: int) -> int:
    text = f"{config.augment.mix_off_epochs} epochs"
    batch = config.schedule.global_batch
    return schedule.total - steps_of(text, "augment.mix_off_epochs", steps_per_epoch, batch)


def _macs(network: torch.nn.Module, input_size: int) -> float:
    from l2vit.models.count import count_macs

    try:
        return count_macs(network, input_size)
    except (RuntimeError, NotImplementedError):  # a foreign model the meta device cannot run
        return math.nan


def _initialise(
    network: torch.nn.Module,
    config: TrainConfig,
    world: World,
    manifest: Manifest,
    directory: Path,
) -> None:
    from l2vit.train.transfer import load_initial

    problem: UserError | None = None
    try:
        report = load_initial(
            network, config.init, classes=manifest.classes, class_names=manifest.class_names
        )
        if world.main:
            report.save(directory)
            print(report.summary(), flush=True)
    except UserError as error:
        problem = error
    world.raise_on_all_ranks(problem)


def _announce(run: Run, reader: Reader | None) -> None:
    config, split, schedule = run.config, run.engine.split, run.schedule
    order = run.loader.order
    parameters = sum(group.numel for group in run.engine.groups)
    lines = [
        f"{config.model.name}: {parameters / 1e6:.3f} M parameters,"
        f" {run.pace.flops_per_image / 6e9:.3f} G multiply-adds at {config.data.input_size}",
        f"{run.world.size} ranks on {run.world.device.type}, ZeRO-{config.engine.zero_stage},"
        f" {config.engine.precision}; global batch {split.global_batch} ="
        f" {split.micro_batch} × {split.accumulation} × {split.world}",
        f"{schedule.total:,} steps, {run.steps_per_epoch:,} an epoch, warm-up {schedule.warmup:,}",
        "samples come from a stream" if config.data.stream else _left_out(order),
        param_groups.table(
            run.engine.groups, lr=config.optim.lr, weight_decay=config.optim.weight_decay
        ),
    ]
    if reader is not None:
        lines.append(f"continuing from {reader.directory} at step {run.state.step:,}")
    run.metrics.say("\n".join(lines))
    if run.state.order not in ("", order.fingerprint) and not config.data.stream:
        run.metrics.say(
            "data.chunk or the samples of data.subset are others than before: what is left of this"
            " epoch may repeat samples and miss some; the next ones are whole",
            warn=True,
        )


def _left_out(order: Any) -> str:
    """What an epoch drops: never silently."""
    rest = order.samples - order.steps_per_epoch * order.global_batch
    every = f"{order.samples:,} samples, each once an epoch"
    return every + (f", but for {rest:,} left out, other ones in each" if rest else "")
