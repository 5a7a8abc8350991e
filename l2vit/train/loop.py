"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from typing import Any

import torch
import torch.nn.functional as F

from l2vit import console
from l2vit.data.batch import Batch
from l2vit.errors import UserError
from l2vit.train import checkpoint, distributed, guards, report, throughput
from l2vit.train.checkpoint import Reader
from l2vit.train.config import TrainConfig
from l2vit.train.engine import StepOutcome
from l2vit.train.guards import STOPPED, MicroBatch
from l2vit.train.profiling import profiler
from l2vit.train.run import Run, open_run, write_done


def train(config: TrainConfig) -> int:
    """Carry out the run that ``config`` describes, or continue it.

    Every rank calls this. The process group is started and left here.

    Returns:
        Exit status: 0 when the run is finished, ``guards.STOPPED`` (75) when a signal stopped it
        after saving: run the same command again.

    Raises:
        UserError: what a user can mend; the run directory keeps its last checkpoint.
    """
    with open_run(config) as run:
        if run is None:
            if distributed.from_environment().main:
                print(f"{config.run.dir} is finished already", flush=True)
            return 0
        try:
            status = _loop(run)
        except RuntimeError as error:
            if not distributed.is_lost_peer(error):
                raise
            raise UserError(
                f"rank {run.world.rank} lost another rank in step {run.clock.step}"
                f" ({str(error).splitlines()[0]}); the same command continues the run"
            ) from error
        report.finish(run.directory, run.metrics, main=run.world.main, done=status == 0)
        return status


def _loop(run: Run) -> int:
    with profiler(run.config.log.profile_steps, run.directory, run.world) as profile:
        while run.state.step < run.schedule.total:
            loss = _forward_backward(run)
            outcome = _optimizer_step(run)
            mean_loss, stopping = _exchange(run, loss)
            if guards.is_spike(mean_loss, run.state, run.config.faults):
                _roll_back(run, mean_loss)
                continue
            _judge(run, outcome, mean_loss)
            last = run.state.step == run.schedule.total
            if last or _due(run, run.config.log.every):
                _log(run, mean_loss, outcome)
            if _due(run, run.config.log.denominators_every):
                _log_denominators(run)
            if last or _due(run, run.every.evaluate):
                _evaluate(run)
            if last or stopping or _due(run, run.every.save):
                _save(run)
            profile(run.state.step)
            if stopping and not last:
                run.saver.finish()
                run.metrics.say(f"stopped by a signal after saving step {run.state.step:,}")
                return STOPPED
    run.saver.finish()
    if run.world.broadcast(checkpoint.complete_steps(run.directory)[-1:]) != [run.state.step]:
        raise UserError("the last checkpoint could not be saved; make room and run again")
    write_done(run)
    return 0


def _due(run: Run, every: int) -> bool:
    return every > 0 and run.state.step % every == 0


def _forward_backward(run: Run) -> torch.Tensor:
    """Every micro-batch of one step but for its last optimizer step; the rank's mean loss."""
    split, clock = run.engine.split, run.clock
    clock.step = run.state.step + 1
    run.micro = []
    every = run.config.log.denominators_every
    watching = every > 0 and clock.step % every == 0
    for micro_step in range(split.accumulation):
        with clock("data"):
            batch = _next_batch(run)
        with clock("mix"):
            images, targets = run.mixer(batch, mix=run.state.step < run.mix_until)
        run.metrics.first_pictures(run.state.step, functools.partial(_pictures, run, images))
        run.seed_step(micro_step)
        with clock("forward"), run.denominators.watch() if watching else contextlib.nullcontext():
            logits = run.engine.forward(images)
            loss = -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()
        with clock("backward"):
            run.engine.backward(loss)
        kept = images if run.config.faults.spike_factor else None
        run.micro.append(MicroBatch(loss.detach(), batch.sample_ids, kept))
        if micro_step < split.accumulation - 1:
            run.engine.micro_step()
    return torch.stack([micro.loss for micro in run.micro]).mean()


def _pictures(run: Run, images: torch.Tensor) -> Any:
    """The first pictures of the micro-batch, mixed, as one (H, W, 3) array of bytes."""
    from l2vit.data.contact_sheet import contact_sheet, to_bytes

    augment = run.config.augment
    return contact_sheet(to_bytes(images[:32], augment.mean, augment.std))


def _next_batch(run: Run) -> Batch:
    try:
        return next(run.loader)
    except UserError as error:  # this rank's alone: nobody else can tell of it
        error.args = (f"rank {run.world.rank}: {error}",)
        if not run.world.main:
            console.tell(f"error: {error}", error=True)
        raise


def _optimizer_step(run: Run) -> StepOutcome:
    step = run.state.step
    with run.clock("reduce"):
        return run.engine.step(
            lr=run.schedule.lr(step), weight_decay=run.schedule.weight_decay(step)
        )


def _exchange(run: Run, loss: torch.Tensor) -> tuple[float, bool]:
    """Tell the other ranks the few things all must know: (mean loss, whether to stop)."""
    with run.clock("reduce"):
        told = [float(loss), float(run.stop.arrived), run.saver.written]
        total, stopping, written = run.world.sum(told)
    run.state.step += 1
    run.state.images_seen += run.global_batch
    with run.clock("save"):
        run.saver.poll(written)
    return total / run.world.size, stopping > 0


def _judge(run: Run, outcome: StepOutcome, mean_loss: float) -> None:
    """Count a skipped step, and write down its samples."""
    scaling = run.config.engine.precision == "fp16" and math.isfinite(mean_loss)
    if not outcome.applied and not scaling:
        guards.record_nonfinite(run.directory, run.world, run.state, run.micro, run.key_of)
        run.metrics.say(f"step {run.state.step:,} skipped: loss or gradient not finite", warn=True)
    guards.count_skipped(
        run.state,
        applied=outcome.applied,
        scaling=scaling,
        limit=run.config.faults.max_nonfinite,
        run=run.directory,
    )


def _roll_back(run: Run, mean_loss: float) -> None:
    """Return to the last checkpoint, but go on with the samples after the spike."""
    sheet = guards.save_spike(run.directory, run.world, run.state, run.micro, run.config.augment)
    run.saver.finish()
    steps = run.world.broadcast(checkpoint.complete_steps(run.directory))
    if not steps:
        run.metrics.say(f"loss {mean_loss:.3f} spiked before the first checkpoint", warn=True)
        return
    spiked, images_seen, rollbacks = run.state.step, run.state.images_seen, run.state.rollbacks + 1
    run.restore(Reader(checkpoint.step_directory(run.directory, steps[-1])))
    if rollbacks - run.state.rollbacks > guards.MAX_ROLLBACKS:
        raise UserError(
            f"the loss spiked {rollbacks} times after step {run.state.step}; see {sheet.parent};"
            " try a lower optim.lr or a higher faults.spike_factor"
        )
    run.state.images_seen, run.state.rollbacks = images_seen, rollbacks
    run.metrics.rewind(run.state.step)
    run.pace.mark(time.monotonic(), run.state.step)
    run.metrics.say(
        f"loss {mean_loss:.3f} at step {spiked:,} is a spike: back to step {run.state.step:,},"
        f" the samples since then are skipped; see {sheet}",
        warn=True,
    )


def _log(run: Run, mean_loss: float, outcome: StepOutcome) -> None:
    with run.clock("log"):
        state, step = run.state, run.state.step
        values = {
            "loss": mean_loss,
            "learning_rate": run.schedule.lr(step - 1),
            "grad_norm": outcome.grad_norm,
            "param_norm": run.engine.param_norm(),
            "epoch": state.images_seen / (run.steps_per_epoch * run.global_batch),
            "skipped_steps": state.skipped_steps,
            "rollbacks": state.rollbacks,
            "memory_gib": throughput.memory_gib(run.world.device),
            **run.pace.measure(time.monotonic(), step, run.schedule.total),
        }
        if run.saver.seconds:
            values["checkpoint_seconds"] = run.saver.seconds
            values["checkpoint_stall_seconds"] = run.saver.stalled_seconds
        run.metrics.log(step, values, images_seen=state.images_seen)


def _log_denominators(run: Run) -> None:
    with run.clock("log"):
        shares = run.denominators.report(run.metrics, run.state.step)
        if shares:
            run.metrics.log(run.state.step, shares, images_seen=run.state.images_seen)


def _evaluate(run: Run) -> None:
    with run.clock("evaluate"):
        values = run.evaluator.run(run.engine)
    if not values:
        return
    run.state.metrics = values
    run.metrics.log(run.state.step, values, images_seen=run.state.images_seen)
    shown = [f"{k} {v:.2f}" for k, v in values.items() if k.endswith("top1_percent")]
    run.metrics.say(f"step {run.state.step:,}: {', '.join(shown)}")


def _save(run: Run) -> None:
    state = run.state
    accuracy = max((v for k, v in state.metrics.items() if k.endswith("/top1_percent")), default=-1)
    best = accuracy > state.best_accuracy
    if best:
        state.best_accuracy = accuracy
    with run.clock("save"):
        run.saver.start(run.engine, run.meta(), best=best)
