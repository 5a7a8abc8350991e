"""Each failure injected into real ranks, and survived or named."""

import json
import signal
import time

import pytest
import torch
from forked_ranks import Ranks
from small_runs import losses, records, settings, train

from l2vit.data.manifest import Manifest
from l2vit.data.shards import ShardReader
from l2vit.train import checkpoint, guards, watchdog
from l2vit.train.checkpoint import Reader


def wait_for_step(run, step, ranks):
    """Until ``metrics.jsonl`` has a record of ``step``."""
    while ranks.processes[0].is_alive():
        path = run / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_on_all_and_asks_to_be_run_again(number, shards, tmp_path):
    run = tmp_path / "run"
    # Far longer than it takes to see the third step, however busy the machine.
    endless = {"checkpoint__every": "100000 steps", "schedule__length": "100000 steps"}
    path = settings(shards, run, **endless)
    ranks = Ranks(train, 2, path, directory=tmp_path, raw=True)
    wait_for_step(run, 3, ranks)
    ranks.kill(1, number)
    assert ranks.wait() == [guards.STOPPED] * 2, ranks.log(0)[-2000:]
    (saved,) = checkpoint.complete_steps(run)
    assert max(losses(run)) == saved >= 3
    assert not (run / "DONE").exists()
    assert "<svg" in (run / "report.html").read_text()


# -- numbers that are not finite


def train_poisoned(path, steps, in_gradient):
    """Train with a loss (or only a gradient) of rank 1 that is not finite at ``steps``."""
    from l2vit.train.engine import Engine

    forward, count = Engine.forward, 0

    def poisoned(self, images):
        nonlocal count
        count += 1
        logits = forward(self, images)
        if count in steps and self.world.rank == 1:
            if in_gradient:
                logits.register_hook(lambda gradient: gradient * float("inf"))
            else:
                logits = logits + float("nan")
        return logits

    Engine.forward = poisoned
    return train(path)


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped_by_all_ranks(in_gradient, shards, tmp_path):
    run = tmp_path / "run"
    path = settings(shards, run, schedule__length="8 steps", checkpoint__every="1 steps")
    ranks = Ranks(train_poisoned, 2, path, (6, 7), in_gradient, directory=tmp_path, raw=True)
    assert ranks.wait() == [0, 0], ranks.log(0)[-3000:]
    lines = records(run)
    norms = {line["step"]: line["param_norm"] for line in lines}
    assert norms[5] == norms[6] == norms[7] != norms[8], "a skipped step changed the weights"
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [schedule_rate(i) for i in range(8)], rel=1e-9
    ), "a skipped step held up the schedule"
    assert lines[-1]["skipped_steps"] == 2
    assert Reader(checkpoint.find(run)).meta.state["applied_steps"] == 6
    named = [json.loads(line) for line in (run / guards.NONFINITE).open()]
    assert {entry["step"] for entry in named} == {6, 7}
    if not in_gradient:
        assert {entry["rank"] for entry in named} == {1}
    reader = ShardReader(shards / "train", Manifest.load(shards / "train"))
    for entry in named:
        assert entry["keys"] == [reader.key_of(i) for i in entry["sample_ids"]]
        assert not any("#" in key for key in entry["keys"]), "what an index cannot name"


def schedule_rate(i, peak=5e-3, lowest=1e-6, warmup=4, total=8):
    import math

    if i < warmup:
        return peak * i / (warmup - 1)
    share = (1 + math.cos(math.pi * (i - warmup) / (total - warmup))) / 2
    return lowest + (peak - lowest) * share


def test_skipping_without_end_stops_the_run(shards, tmp_path):
    path = settings(shards, tmp_path / "run", faults__max_nonfinite=2)
    ranks = Ranks(train_poisoned, 2, path, range(3, 99), False, directory=tmp_path, raw=True)
    assert ranks.wait() == [1, 1]
    assert "3 steps in a row were skipped" in ranks.log(0)
    assert "Traceback" not in ranks.log(0) + ranks.log(1)


# -- a rank that hangs


def train_hanging(path, phase):
    """Rank 1 stands still in ``phase`` at its fifth step."""
    import os

    from l2vit.train.engine import Engine
    from l2vit.train.saver import Saver

    owner, name = {
        "forward": (Engine, "forward"),
        "backward": (Engine, "backward"),
        "save": (Saver, "start"),
        "data": (None, ""),
    }[phase]
    if owner is None:
        from l2vit.data import loader

        owner, name = loader.TrainLoader, "__next__"
    original, count = getattr(owner, name), 0

    def hanging(self, *args, **kwargs):
        nonlocal count
        count += 1
        if os.environ["RANK"] == "1" and count == (5 if phase != "save" else 1):
            time.sleep(1000)
        return original(self, *args, **kwargs)

    setattr(owner, name, hanging)
    return train(path)


def test_a_rank_that_hangs_is_named_with_its_phase(shards, tmp_path):
    """In each phase; the runs wait side by side."""
    runs = {}
    for phase in ("data", "forward", "backward", "save"):
        path = settings(shards, tmp_path / phase, faults__hang_seconds=8)
        runs[phase] = Ranks(train_hanging, 2, path, phase, directory=tmp_path, raw=True)
    for phase, ranks in runs.items():
        statuses = ranks.wait()
        said = ranks.log(0) + ranks.log(1)
        assert all(status == watchdog.EXIT_STATUS for status in statuses), said
        assert "rank 1 made no progress for" in said
        assert f"in phase {phase} of step {4 if phase == 'save' else 5}" in said
        assert "rank 0 made no progress" not in said
        assert "hanging" in ranks.log(1), "the rank at fault shows where it stands"


def test_a_rank_that_is_stopped_altogether_is_named(shards, tmp_path):
    run = tmp_path / "run"
    path = settings(shards, run, schedule__length="100000 steps", faults__hang_seconds=4)
    ranks = Ranks(train, 2, path, directory=tmp_path, raw=True)
    wait_for_step(run, 2, ranks)
    ranks.kill(1, signal.SIGSTOP)
    ranks.processes[0].join(300)
    ranks.kill_all()
    assert "rank 1 made no progress for" in ranks.log(0)
    assert "does not answer" in ranks.log(0)


# -- a rank that fails alone


def train_with_a_broken_loader(path):
    """Rank 1 cannot read its third batch."""
    import os

    from l2vit.data import loader
    from l2vit.errors import UserError

    original, count = loader.TrainLoader.__next__, 0

    def broken(self):
        nonlocal count
        count += 1
        if os.environ["RANK"] == "1" and count == 3:
            raise UserError("shard-000001.tar is gone")
        return original(self)

    loader.TrainLoader.__next__ = broken
    return train(path)


def test_the_error_of_one_rank_is_told_with_its_rank(shards, tmp_path):
    path = settings(shards, tmp_path / "run")
    ranks = Ranks(train_with_a_broken_loader, 2, path, directory=tmp_path, raw=True)
    assert ranks.wait() == [1, 1]
    assert "error: rank 1: shard-000001.tar is gone" in ranks.log(1)
    assert "lost another rank" in ranks.log(0)
    assert "Traceback" not in ranks.log(0) + ranks.log(1)


# -- a full disk


def train_on_a_full_disk(path, saves):
    """Saves with these numbers (counted from 1) fail on rank 1 as on a full disk."""
    import os

    from l2vit.errors import UserError

    write, count = checkpoint.write_part, 0

    def failing(target, tensors):
        nonlocal count
        count += 1
        if os.environ["RANK"] == "1" and count in saves:
            raise UserError(f"cannot write {target}: No space left on device")
        return write(target, tensors)

    checkpoint.write_part = failing
    return train(path)


@pytest.mark.ci
def test_a_full_disk_does_not_stop_training_until_it_has_failed_too_often(shards, tmp_path):
    run = tmp_path / "short"
    path = settings(shards, run)
    ranks = Ranks(train_on_a_full_disk, 2, path, (2, 3), directory=tmp_path, raw=True)
    assert ranks.wait() == [0, 0], ranks.log(0)[-2000:]
    assert ranks.log(0).count("not saved") == 2
    assert "No space left on device" in ranks.log(0)
    assert checkpoint.complete_steps(run)[-1] == 24 and not checkpoint.torn_steps(run)

    run = tmp_path / "long"
    path = settings(shards, run)
    ranks = Ranks(train_on_a_full_disk, 2, path, range(3, 99), directory=tmp_path, raw=True)
    assert ranks.wait() == [1, 1]
    assert "3 checkpoints in a row could not be saved" in ranks.log(0)
    assert checkpoint.complete_steps(run)[-1] == 8, "the good checkpoints must stay"


def train_that_cannot_close(path):
    """The first part that is closed fails; what was closed afterwards."""
    from l2vit.train.engine import Engine
    from l2vit.train.watchdog import Watchdog

    def failing(self):
        raise RuntimeError("no closing this")

    closed = []
    Watchdog.close, Engine.close = failing, lambda self: closed.append("engine")
    with pytest.raises(RuntimeError, match="no closing this"):
        train(path)
    return [*closed, torch.distributed.is_initialized()]


def test_what_cannot_be_closed_keeps_nothing_else_open(shards, tmp_path):
    path = settings(shards, tmp_path / "run", schedule__length="5 steps")
    (found,) = Ranks(train_that_cannot_close, 1, path, directory=tmp_path, raw=True).results()
    assert found == ["engine", False]


# -- spikes


def train_spiking(path, call):
    """The logits of the ``call``-th forward pass are scaled up on every rank."""
    from l2vit.train.engine import Engine

    forward, count = Engine.forward, 0

    def spiking(self, images):
        nonlocal count
        count += 1
        return forward(self, images) * (200.0 if count == call else 1.0)

    Engine.forward = spiking
    return train(path)


def test_a_spike_rolls_back_and_skips_its_samples(shards, tmp_path):
    run = tmp_path / "run"
    path = settings(
        shards, run, schedule__length="32 steps", faults__spike_factor=4.0, optim__lr=1e-3
    )
    ranks = Ranks(train_spiking, 2, path, 27, directory=tmp_path, raw=True)
    assert ranks.wait() == [0, 0], ranks.log(0)[-3000:]
    assert "is a spike: back to step 24" in ranks.log(0)
    state = Reader(checkpoint.find(run)).meta.state
    assert state["rollbacks"] == 1
    assert state["images_seen"] == (32 + 3) * 16, "three steps' samples were to be skipped"
    assert list(losses(run)) == list(range(1, 33)), "the curve has gaps or double entries"
    from PIL import Image

    with Image.open(run / guards.SPIKES / "step-00000027.png") as sheet:
        assert sheet.size == (8 * 16, 2 * 16), "16 pictures in rows of 8"
    listed = json.loads((run / guards.SPIKES / "step-00000027.json").read_text())
    assert len(listed["sample_ids_by_rank"]) == 2


# -- memory


def train_with_little_memory(path, limit):
    """A forward pass of more than ``limit`` images runs out of memory on rank 1."""
    import os

    import small_net

    from l2vit.train import model

    forward = small_net.SmallNet.forward

    def limited(self, images):
        if os.environ["RANK"] == "1" and self.training and len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    small_net.SmallNet.forward = limited
    model.probes_memory = lambda world: True
    return train(path)


def test_out_of_memory_halves_the_micro_batch_on_every_rank(shards, tmp_path):
    run = tmp_path / "run"
    path = settings(shards, run, schedule__length="4 steps")
    ranks = Ranks(train_with_little_memory, 2, path, 5, directory=tmp_path, raw=True)
    assert ranks.wait() == [0, 0], ranks.log(0)[-3000:]
    assert "micro-batch 8 (another rank): trying 4 × accumulation 2" in ranks.log(0)
    assert "global batch 16 = 4 × 2 × 2" in ranks.log(0)
