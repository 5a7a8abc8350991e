"""A step's figures are read one step later, and nothing comes of it but time."""

import functools
import os

import pytest
import torch
from forked_ranks import Ranks
from small_runs import losses, settings, train
from torch.utils._python_dispatch import TorchDispatchMode

from l2vit.train import checkpoint
from l2vit.train.checkpoint import Reader

SELDOM = {"checkpoint__every": "8 steps", "eval__every": "8 steps"}


def train_with_accidents(path, spikes, poisoned, fused):
    """Logits scaled up at some forward passes of all ranks, not finite at some of rank 1."""
    from l2vit.train.engine import Engine

    if fused:  # as on GPUs, where the device decides about a step
        torch.optim.AdamW = functools.partial(torch.optim.AdamW, fused=True)

    forward, count = Engine.forward, 0

    def harmed(self, images):
        nonlocal count
        count += 1
        logits = forward(self, images)
        if count in poisoned and self.world.rank == 1:
            logits = logits * float("nan")
        return logits * (200.0 if count in spikes else 1.0)

    Engine.forward = harmed
    return train(path)


def everything(run):
    reader = Reader(checkpoint.find(run))
    state = {k: v for k, v in reader.meta.state.items() if k != "seconds"}
    return state, {key: reader.tensor(key) for key in reader.tensors}


@pytest.mark.parametrize(
    ("spikes", "poisoned", "micro_batch", "fused"),
    [
        ((), (), 8, False),
        ((), (11, 12, 16), 4, False),
        ((), (11, 12, 16), 4, True),
        ((27,), (), 4, False),
        ((24,), (), 8, False),  # a save is due: read at once
        ((27, 30), (28,), 8, True),
    ],
    ids=["none", "skipped", "on the device", "spike", "spike before a save", "spikes and more"],
)
def test_reading_later_changes_nothing(spikes, poisoned, micro_batch, fused, shards, tmp_path):
    """Against a run that reads every step at once since it logs every step."""
    found = []
    turns = 8 // micro_batch
    for every in (1, 1000):
        run = tmp_path / str(every)
        path = settings(
            shards,
            run,
            **SELDOM,
            schedule__length="32 steps",
            optim__lr=1e-3,
            faults__spike_factor=4.0 if spikes else 0.0,
            engine__micro_batch=micro_batch,
            log__every=every,
        )
        calls = [passes(steps, spikes, turns, every) for steps in (spikes, poisoned)]
        calls.append(fused)
        ranks = Ranks(train_with_accidents, 2, path, *calls, directory=tmp_path, raw=True)
        assert ranks.wait() == [0, 0], ranks.log(0)[-3000:]
        assert ranks.log(0).count("is a spike") == len(spikes)
        found.append(everything(run))
    (state, tensors), (later_state, later_tensors) = found
    assert later_state == state and state["rollbacks"] == len(spikes)
    assert state["skipped_steps"] == (0 if spikes else len(poisoned)), "a rollback forgets them"
    assert all(torch.equal(later_tensors[key], tensors[key]) for key in tensors)
    assert sorted(losses(tmp_path / "1000")) == [1, 32], "the first step is recorded at once"
    assert losses(tmp_path / "1")[32] == losses(tmp_path / "1000")[32]
    named = [tmp_path / str(every) / "nonfinite.jsonl" for every in (1, 1000)]
    first, later = (path.read_text() if path.exists() else "" for path in named)
    assert first == later and bool(first) == bool(poisoned)


def passes(steps, spikes, turns, every):
    """The forward passes of the n-th optimizer steps, read at once (``every`` 1) or later.

    Later, the step after a spike has been begun when the spike is seen, unless a save is due.
    """
    found = []
    for step in steps:
        undone = sum(1 for spike in spikes if spike < step and spike % 8 and every > 1)
        found += [(step + undone - 1) * turns + turn + 1 for turn in range(turns)]
    return found


def train_watched(path):
    """Nothing in a step may wait, but for DeepSpeed: values read, exchanges of ranks."""
    import sys

    from l2vit.train.distributed import World
    from l2vit.train.trainer import Trainer

    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.aten._local_scalar_dense.default:
                note()
            return operator(*args, **(kwargs or {}))

    def note():
        frame, files = sys._getframe(1), []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        ours = [f for f in files if f"{os.sep}l2vit{os.sep}" in f]
        if not any("deepspeed" in f for f in files):
            waits.append(ours[:3])

    step = Trainer.train_step

    def watched(self):
        with Watch():
            return step(self)

    Trainer.train_step = watched
    for name in ("sum", "max", "gather", "broadcast", "barrier"):
        method = getattr(World, name)

        def asking(self, *args, _method=method, _name=name):
            asked.append(_name)
            return _method(self, *args)

        setattr(World, name, asking)
    asked = []
    run_decide = Trainer.decide

    def decide(self, newest):
        before, saving = len(asked), self.saver._save is not None
        answer = run_decide(self, newest)
        if not (saving or self._acts()):  # the commit of a save is told to all ranks
            assert asked[before:] == [], "a step that nothing follows asked the other ranks"
        return answer

    Trainer.decide = decide
    assert train(path) == 0
    return waits


def test_nothing_waits_in_a_step(shards, tmp_path):
    path = settings(shards, tmp_path / "run", **SELDOM, log__every=8)
    results = Ranks(train_watched, 2, path, directory=tmp_path, raw=True)
    assert results.results() == [[], []]
