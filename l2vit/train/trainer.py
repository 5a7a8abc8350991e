"""The trainer: the loop, its step, and what is done between two steps.

Nothing in a step waits for the device: losses, norms and flags are read one step later, and what
follows from them is decided then. Only a step after which something is written, evaluated or ended
is read at once.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l2vit import cli
from l2vit.config import to_tree
from l2vit.data.contact_sheet import contact_sheet
from l2vit.errors import UserError
from l2vit.train import checkpoint, guards, histograms, run_dir, throughput
from l2vit.train.checkpoint import CheckpointMeta, Reader
from l2vit.train.config import TrainConfig
from l2vit.train.denominators import Denominators
from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.guards import STOPPED, StopSignal
from l2vit.train.metrics import Metrics
from l2vit.train.profiling import profiler
from l2vit.train.provenance import git_commit, versions
from l2vit.train.run_lock import RunLock
from l2vit.train.saver import Saver
from l2vit.train.schedule import Intervals, Schedule
from l2vit.train.state import TrainState
from l2vit.train.step import MicroBatch, StepResult, exchange
from l2vit.train.task import Evaluator, Loader, Task
from l2vit.train.throughput import PhaseClock, Throughput


@dataclass
class Trainer:
    """A run under way on this rank; ``startup.open_trainer`` builds one."""

    config: TrainConfig
    world: World
    task: Task[Any]
    loader: Loader
    engine: Engine
    schedule: Schedule
    every: Intervals
    evaluator: Evaluator
    saver: Saver
    metrics: Metrics
    throughput: Throughput
    denominators: Denominators
    stop: StopSignal
    lock: RunLock
    state: TrainState
    _stopping: bool = field(init=False, default=False)
    """Some rank was asked to stop: the step under way is the last."""
    _unread: deque[StepResult] = field(init=False, default_factory=deque)
    """Steps begun and not yet decided about: at most one between two steps."""
    _replay: deque[Any] = field(init=False, default_factory=deque)
    """Loaded micro-batches to be used once more, before the loader's next."""

    # -- the loop

    def train(self) -> int:
        """Train to the end, or until a signal asks to stop.

        Returns:
            Exit status: 0 when the run is finished, ``guards.STOPPED`` when it was stopped after
            saving.
        """
        with profiler(self.config.log.profile_steps, self.directory, self.world) as profile:
            while self.state.step < self.schedule.total:
                result = self.train_step()
                if not self.decide(result):
                    continue  # back at the last checkpoint
                if self._last or self._first or self._due(self.config.log.every):
                    self.log(result)
                if self._due(self.config.log.denominators_every):
                    self.log_denominators()
                if self._due(self.config.log.histograms_every):
                    self.log_histograms()
                if self._last or self._due(self.every.evaluate):
                    self.evaluate()
                if self._last or self._stopping or self._due(self.every.save):
                    self.save()
                profile(self.state.step)
                if self._stopping and not self._last:
                    return self._stopped()
        return self._finished()

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    @property
    def _first(self) -> bool:
        return self.state.step == 1

    @property
    def _last(self) -> bool:
        return self.state.step == self.schedule.total

    def _acts(self) -> bool:
        """True if this step is followed by something that needs it read first."""
        log, every = self.config.log, self.every
        recurring = (log.every, log.denominators_every, every.evaluate, every.save)
        at_once = self._first or self._last or self._stopping
        return at_once or any(map(self._due, recurring))

    # -- one step

    def train_step(self) -> StepResult:
        """Forward and backward passes and the optimizer step of one global batch.

        Nothing here waits for the device or for another rank, but for DeepSpeed's own step in fp16
        (which needs its loss scale), in fp32 and at ZeRO-3.
        """
        step = self.state.step
        self.clock.step = step + 1
        micro_batches = [self._micro_step(n) for n in range(self.engine.split.accumulation)]
        with self.clock("reduce"):
            outcome = self.engine.step(
                lr=self.schedule.lr(step), weight_decay=self.schedule.weight_decay(step)
            )
            pending = exchange(
                micro_batches,
                outcome,
                stop=self.stop.arrived,
                lock_lost=bool(self.lock.lost),
                written=self.saver.written,
                world=self.world,
            )
        self.state.step += 1
        self.state.images_seen += self.engine.split.global_batch
        images_seen = self.state.images_seen
        return StepResult(step + 1, images_seen, micro_batches, self.world, pending)

    def _micro_step(self, number: int) -> MicroBatch:
        """Forward and backward of one micro-batch; the last one's gradient awaits the step."""
        with self.clock("data"):
            loaded = self._next_batch()
        with self.clock("mix"):
            batch = self.task.prepare(loaded, steps_left=self.schedule.total - self.state.step)
        self.metrics.first_pictures(self.state.step, lambda: self._sheet(batch.images))
        self._seed(number)
        with self.clock("forward"), self._watching():
            loss, parts = self.task.loss(self.engine, batch)
        with self.clock("backward"):
            self.engine.backward(loss)
        if number < self.engine.split.accumulation - 1:
            self.engine.micro_step()
        kept = loaded if self.config.faults.spike_factor else None
        return MicroBatch(loss.detach(), parts, batch.sample_ids, kept)

    def _next_batch(self) -> Any:
        if self._replay:
            return self._replay.popleft()
        try:
            return next(self.loader)
        except UserError as error:  # only this rank knows
            error.args = (f"rank {self.world.rank}: {error}",)
            if not self.world.main:
                cli.tell(f"error: {error}", error=True)
            raise

    def _seed(self, micro_step: int) -> None:
        """Make drop path a pure function of (seed, step, place of the micro-batch in the step)."""
        place = micro_step * self.world.size + self.world.rank
        words = np.random.SeedSequence([self.config.run.seed, self.state.step, place])
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))

    def _watching(self) -> AbstractContextManager[None]:
        every = self.config.log.denominators_every
        watched = every > 0 and self.clock.step % every == 0
        return self.denominators.watch() if watched else contextlib.nullcontext()

    def _sheet(self, images: torch.Tensor) -> np.ndarray:
        return contact_sheet(self.task.pictures(images[:32]))

    # -- deciding, one step later

    def decide(self, newest: StepResult) -> bool:
        """Read the step before the newest, and the newest too if something follows it.

        Returns:
            False if a loss was a spike and the run is back at its last checkpoint.
        """
        self._unread.append(newest)
        while len(self._unread) > (0 if self._acts() else 1):
            if not self._judge(self._unread.popleft()):
                return False
        return True

    def _judge(self, result: StepResult) -> bool:
        """Commit a save, count a skipped step; False after returning to a checkpoint."""
        with self.clock("reduce"):
            figures = result.figures
        if figures.lock_lost:
            raise UserError(self.lock.lost or "rank 0 lost the lock on the run directory")
        with self.clock("save"):
            self.saver.poll(figures.ranks_written)
        self._stopping |= figures.stopping
        if guards.is_spike(figures.loss, self.state, self.config.faults):
            return not self._roll_back(result)
        self.metrics.note_loss(figures.loss)
        if result.step < self.state.step:  # else what acts on it says more
            self.metrics.progress(result.step, figures.loss, self._rates)
        scaling = self.config.engine.precision == "fp16" and math.isfinite(figures.loss)
        if not result.applied and not scaling:
            keys_of = self.task.sample_keys
            guards.record_nonfinite(self.directory, self.world, result, keys_of)
            self.metrics.say(
                f"step {result.step:,} skipped: loss or gradient not finite", warn=True
            )
        guards.count_skipped(
            self.state,
            step=result.step,
            applied=result.applied,
            scaling=scaling,
            limit=self.config.faults.max_nonfinite,
            run=self.directory,
        )
        return True

    def _rates(self) -> dict[str, float]:
        return self.throughput.rates(time.monotonic(), self.state.step, self.schedule.total)

    def _roll_back(self, spike: StepResult) -> bool:
        """Return to the last checkpoint, but go on with the samples after the spike.

        The step after it, which was begun before the spike was seen, is undone as well, and its
        samples come first.

        Returns:
            False if there is no checkpoint yet: then training just goes on.
        """
        loss = spike.figures.loss
        sheet = guards.save_spike(self.directory, self.world, spike, self._pictures(spike))
        self.saver.finish()
        steps = self.world.broadcast(checkpoint.complete_steps(self.directory))
        if not steps:
            self.metrics.say(f"loss {loss:.3f} spiked before the first checkpoint", warn=True)
            return False
        undone = [micro.loaded for later in self._undo() for micro in later.micro_batches]
        self._replay.extendleft(reversed(undone))
        rollbacks = self.state.rollbacks + 1
        self.restore(Reader(checkpoint.step_directory(self.directory, steps[-1])))
        if rollbacks - self.state.rollbacks > guards.MAX_ROLLBACKS:
            raise UserError(
                f"the loss spiked {rollbacks} times after step {self.state.step}; see"
                f" {sheet.parent}; try a lower optim.lr or a higher faults.spike_factor"
            )
        self.state.images_seen, self.state.rollbacks = spike.images_seen, rollbacks
        self.metrics.rewind(self.state.step)
        self.throughput.mark(time.monotonic(), self.state.step)
        self.metrics.say(
            f"loss {loss:.3f} at step {spike.step:,} is a spike: back to step"
            f" {self.state.step:,}, the samples since then are skipped; see {sheet}",
            warn=True,
        )
        return True

    def _undo(self) -> Iterator[StepResult]:
        """The steps begun and not decided about, once no rank has anything under way for them."""
        while self._unread:
            later = self._unread.popleft()
            later.pending.read()
            yield later

    def _pictures(self, result: StepResult) -> np.ndarray:
        """The step's images on this rank as the network saw them."""
        left = self.schedule.total - result.step + 1
        batches = (self.task.prepare(m.loaded, steps_left=left) for m in result.micro_batches)
        return np.concatenate([self.task.pictures(batch.images) for batch in batches])

    # -- between two steps

    def log(self, result: StepResult) -> None:
        """Write the record of the step."""
        with self.clock("log"):
            state, figures = self.state, result.figures
            values = {
                "loss": figures.loss,
                **{f"loss/{name}": value for name, value in figures.parts.items()},
                "learning_rate": self.schedule.lr(state.step - 1),
                "grad_norm": figures.grad_norm,
                "param_norm": self.engine.param_norm(),
                "epoch": state.images_seen / self._images_per_epoch,
                "skipped_steps": state.skipped_steps,
                "rollbacks": state.rollbacks,
                "memory_gib": throughput.memory_gib(self.world.device),
                **self.throughput.measure(time.monotonic(), state.step, self.schedule.total),
            }
            if self.saver.seconds:
                values["checkpoint_seconds"] = self.saver.seconds
                values["checkpoint_stall_seconds"] = self.saver.stalled_seconds
            self.metrics.log(state.step, values, images_seen=state.images_seen)

    def log_denominators(self) -> None:
        """Write the histograms of linear attention's denominators."""
        with self.clock("log"):
            shares = self.denominators.report(self.metrics, self.state.step)
            if shares:
                self.metrics.log(self.state.step, shares, images_seen=self.state.images_seen)

    def log_histograms(self) -> None:
        """Show the parameters' distributions."""
        with self.clock("log"):
            histograms.log_parameters(self.engine, self.metrics, self.state.step, self.world)

    def evaluate(self) -> None:
        """Measure the evaluation sets and record the figures."""
        with self.clock("evaluate"):
            values = self.evaluator.run(self.engine)
        if not values:
            return
        self.state.metrics, self.state.evaluated_step = values, self.state.step
        self.metrics.log(self.state.step, values, images_seen=self.state.images_seen)
        self.metrics.picture(self.state.step, "val/predictions", self.evaluator.picture())
        shown = [f"{k} {v:.4g}" for k, v in values.items() if k.endswith(self.task.headline)]
        self.metrics.say(f"step {self.state.step:,}: {', '.join(shown)}")

    def save(self) -> None:
        """Begin to save; the records up to here are on the disk before."""
        state, headline = self.state, self.task.headline
        reached = max((v for k, v in state.metrics.items() if k.endswith(headline)), default=-1)
        best = reached > state.best_accuracy
        if best:
            state.best_accuracy = reached
        with self.clock("save"):
            self.metrics.sync()
            self.saver.start(self.engine, self.checkpoint_meta(), best=best)

    def restore(self, reader: Reader) -> None:
        """Take weights, moments, average and counters from a checkpoint."""
        self.engine.load(reader.read, ema=reader.meta.has_ema)
        self.state = TrainState.from_dict(reader.meta.state)
        self.engine.applied_steps = self.state.applied_steps
        self.engine.loss_scaler = self.state.loss_scaler

    def checkpoint_meta(self) -> CheckpointMeta:
        """What a checkpoint saved now says about itself."""
        state, data = self.state, self.task.data
        state.applied_steps = self.engine.applied_steps
        state.loss_scaler = self.engine.loss_scaler
        state.order = self.loader.order.fingerprint
        state.headline = self.task.headline
        state.seconds += self.clock.lap()
        return CheckpointMeta(
            step=state.step,
            epoch=state.images_seen // self._images_per_epoch,
            images_seen=state.images_seen,
            config=to_tree(self.config),
            classes=data.classes,
            class_names=data.class_names,
            class_hash=data.class_hash,
            manifest_hash=data.manifest_hash,
            data=data.provenance,
            git_commit=git_commit(),
            versions=versions(),
            metrics=dict(state.metrics),
            has_ema=self.engine.ema is not None,
            state=state.to_dict(),
        )

    def _stopped(self) -> int:
        self.saver.finish()
        self.metrics.say(f"stopped by a signal after saving step {self.state.step:,}")
        return STOPPED

    def _finished(self) -> int:
        self.saver.finish()
        saved = checkpoint.complete_steps(self.directory)[-1:]
        if self.world.broadcast(saved) != [self.state.step]:
            raise UserError("the last checkpoint could not be saved; make room and run again")
        if self.world.main:
            run_dir.write_done(self.directory, self.state, self.config.schedule)
        return 0

    # -- derived

    @property
    def clock(self) -> PhaseClock:
        """Where this rank is, and how its time is spent."""
        return self.throughput.clock

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir)

    @property
    def _images_per_epoch(self) -> int:
        return self.loader.order.steps_per_epoch * self.engine.split.global_batch
