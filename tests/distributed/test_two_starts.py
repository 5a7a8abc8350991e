"""Two starts on one run directory, and a run that lost its lock."""

import os
import signal
import time

import pytest
from forked_ranks import Ranks
from small_runs import losses, settings, train

from l2vit.train import checkpoint, run_lock

pytestmark = pytest.mark.ci
ENDLESS = {"checkpoint__every": "100000 steps", "schedule__length": "100000 steps"}


def train_with_quick_beats(path):
    """Train, and look at the lock all the time."""
    run_lock.BEAT = 0.02
    run_lock.SETTLE = 0.02
    return train(path)


def wait_for_steps(run, ranks):
    while ranks.processes[0].is_alive():
        if (run / "metrics.jsonl").exists() and len(losses(run)) > 2:
            return
        time.sleep(0.02)
    raise AssertionError(ranks.log(0)[-2000:])


@pytest.fixture
def begun(shards, tmp_path):
    """A run of two ranks without an end, a few steps under way."""
    run = tmp_path / "run"
    path = settings(shards, run, **ENDLESS)
    ranks = Ranks(train_with_quick_beats, 2, path, directory=tmp_path, raw=True)
    wait_for_steps(run, ranks)
    yield run, path, ranks
    ranks.kill_all()


def test_the_second_ends_on_all_ranks_and_changes_nothing(begun, tmp_path):
    run, path, first = begun
    saving = checkpoint.step_directory(run, 7)  # without its checkpoint.json: a save in progress
    saving.mkdir()
    (saving / "part").write_text("half")
    second = Ranks(train, 2, path, directory=tmp_path, raw=True)
    assert second.wait() == [2, 2]
    pid = first.processes[0].pid
    said = second.log(0).strip().splitlines()[-1]
    assert (
        f"error: rank 0: run.dir: {run} is in use by process {pid} on {os.uname().nodename}" in said
    )
    assert "in use" not in second.log(1)
    assert (saving / "part").read_text() == "half"

    first.kill_all()  # SIGKILL: nobody could release the lock
    assert (run / "LOCK").exists()
    third = Ranks(train, 2, path, directory=tmp_path, raw=True)
    wait_for_new_save(third, run, saving)
    third.kill(0, signal.SIGTERM)
    assert third.wait() == [75, 75], third.log(0)[-2000:]
    assert not (run / "LOCK").exists() and checkpoint.complete_steps(run)


def wait_for_new_save(ranks, run, torn):
    while ranks.processes[0].is_alive() and torn.exists():
        time.sleep(0.02)
    wait_for_steps(run, ranks)


def test_a_lost_lock_ends_all_ranks_without_a_save(begun):
    run, _, ranks = begun
    (run / "LOCK").unlink()
    assert ranks.wait() == [1, 1]
    assert "LOCK was deleted: ending without saving" in ranks.log(0)
    assert not checkpoint.complete_steps(run) and not (run / "LOCK").exists()
