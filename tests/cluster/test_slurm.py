"""The batch scripts under a real Slurm: two node names on this machine, two real ranks."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import slurm
import small_runs
import torch
from miniature import MINIATURE, NASTY, equal, kept_whole

from l2vit.launch import processes
from l2vit.train import checkpoint
from l2vit.train.run_dir import reached

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing()),
]
OPTIONS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    own = slurm.Slurm(tmp_path_factory.mktemp("slurm"))
    own.environment |= {"VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    try:
        own.start()
        yield own
    finally:
        own.stop()


class Submitted:
    """A job of ``launch/slurm/pretrain.sbatch`` and its run directory."""

    def __init__(
        self,
        cluster: slurm.Slurm,
        run: Path,
        shards: Path,
        *arguments: str,
        flags: tuple[str, ...] = ("--time=30",),
    ):
        self.cluster, self.run, self.log = cluster, run, run.with_suffix(".log")
        config = small_runs.settings(shards, run, **MINIATURE)
        command = ["sbatch", "--parsable", *OPTIONS, f"--output={self.log}", *flags]
        command += [str(ROOT / "launch/slurm/pretrain.sbatch"), "--config", str(config)]
        self.job = cluster.run(*command, *arguments, cwd=ROOT, check=True).strip()

    def wait(self, *states: str) -> str:
        """Until the job is in one of ``states``; a queued job does not wait out its delay."""
        while True:
            found = self.cluster.state(self.job)
            if found["JobState"] in states:
                return found["JobState"]
            self.still_going()
            if found["JobState"] == "PENDING":
                self.cluster.begin_now(self.job)
            time.sleep(0.3)

    def still_going(self) -> None:
        """Fail when the job is over; while Slurm queues it again it may look so for a moment."""
        states = []
        for _ in range(10):
            states.append(self.cluster.state(self.job)["JobState"])
            if states[-1] not in OVER:
                return
            time.sleep(0.5)
        log = (self.cluster.folder / "slurmctld.log").read_text()[-3000:]
        raise AssertionError(f"{states[-1]}\n{self.said()}\n{log}")

    def wait_for_step(self, step: int) -> None:
        while reached(self.run).saved <= step:
            self.still_going()
            self.cluster.begin_now(self.job)
            time.sleep(0.1)

    def restarted(self, count: int) -> None:
        """Until Slurm has queued the job again so often."""
        while int(self.cluster.state(self.job)["Restarts"]) < count:
            self.still_going()
            time.sleep(0.2)

    def ranks(self) -> list[int]:
        """The processes of this job's ranks."""
        mark = f"SLURM_JOB_ID={self.job}".encode()
        found = []
        for process in processes.marked(mark):
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            if b"launch/pretrain.sh" in words and b"python" in words.split(b"\0")[0]:
                found.append(process.pid)
        return found

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def weights(self) -> dict[str, torch.Tensor]:
        return checkpoint.read_weights(checkpoint.find(self.run), "raw")

    def nothing_left(self) -> None:
        while processes.marked(f"SLURM_JOB_ID={self.job}".encode()):
            time.sleep(0.2)


@pytest.fixture(scope="module")
def uninterrupted(cluster, shards, tmp_path_factory):
    """The final weights of a plain run."""
    job = Submitted(cluster, tmp_path_factory.mktemp("plain") / "run", shards)
    job.wait("COMPLETED")
    job.nothing_left()
    assert (job.run / "DONE").exists(), job.said()
    return job.weights()


def test_warned_then_a_rank_killed_then_finished(cluster, shards, uninterrupted, tmp_path):
    """Slurm's warning saves and queues again; so does a failure; the weights are the same."""
    job = Submitted(cluster, tmp_path / "run", shards)
    job.wait_for_step(3)
    cluster.run("scancel", "--batch", "--signal=USR1", job.job, check=True)
    job.restarted(1)
    assert "warned: asking the ranks to save" in job.said()
    assert "stopped by a signal after saving step" in job.said()
    stopped = reached(job.run).saved
    job.wait_for_step(stopped)
    os.kill(job.ranks()[-1], signal.SIGKILL)
    job.restarted(2)
    assert job.wait("COMPLETED") == "COMPLETED"
    job.nothing_left()
    assert (job.run / "DONE").exists(), job.said()
    equal(job.weights(), uninterrupted)


def test_a_time_limit_runs_out_beside_another_job(cluster, shards, uninterrupted, tmp_path):
    """Slurm itself gives the warning; the job beside it meets none of its ranks.

    The warning comes within a minute, sometimes before the ranks are up. That they are stopped
    until then leaves them steps to do after it.
    """
    limit = ("--time=2", "--signal=B:USR1@60")
    short = Submitted(cluster, tmp_path / "short", shards, flags=limit)
    other = Submitted(cluster, tmp_path / "other", shards, NASTY)
    while "warned: asking the ranks to save" not in short.said():
        short.still_going()
        if reached(short.run).saved >= 4:
            processes.send(short.ranks(), signal.SIGSTOP)
        time.sleep(0.2)
    processes.send(short.ranks(), signal.SIGCONT)
    short.restarted(1)
    assert f"queueing {short.job} again" in short.said()
    cluster.run("scontrol", "update", f"JobId={short.job}", "TimeLimit=30", check=True)
    for job in (short, other):
        job.wait("COMPLETED")
        job.nothing_left()
        assert (job.run / "DONE").exists(), job.said()
        equal(job.weights(), uninterrupted)
    kept_whole(other.run)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, shards, tmp_path):
    job = Submitted(cluster, tmp_path / "run", shards)
    job.wait_for_step(3)
    cluster.run("scancel", job.job, check=True)
    job.wait("CANCELLED")
    job.nothing_left()
    assert int(cluster.state(job.job)["Restarts"]) == 0
    assert not (job.run / "DONE").exists()


def test_a_run_that_fails_at_the_same_step_again_ends(cluster, shards, tmp_path):
    """Its second failure is no passing fault: the data is not there."""
    job = Submitted(cluster, tmp_path / "run", shards, "init.source=/nowhere")
    job.wait("FAILED", "COMPLETED")
    job.nothing_left()
    assert int(cluster.state(job.job)["Restarts"]) <= 1
    assert "/nowhere" in job.said()


def test_a_preempted_job_is_queued_by_slurm_alone_and_finishes(
    cluster, shards, uninterrupted, tmp_path
):
    job = Submitted(cluster, tmp_path / "run", shards)
    job.wait_for_step(3)
    urgent = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive"]
    cluster.run(*urgent, "--wrap=sleep 2", "--output=/dev/null", check=True)
    job.restarted(1)
    job.wait("COMPLETED")
    job.nothing_left()
    assert int(cluster.state(job.job)["Restarts"]) == 1
    equal(job.weights(), uninterrupted)


def test_a_lost_node_gives_the_job_back_to_the_queue(cluster, shards, uninterrupted, tmp_path):
    """Its daemon and everything on it die, as with the power; it comes back later."""
    job = Submitted(cluster, tmp_path / "run", shards)
    job.wait_for_step(3)
    lost = cluster.daemons["two"]
    below = processes.sessions_below(lost.pid)
    for rank in job.ranks():
        if b"SLURMD_NODENAME=two" in Path(f"/proc/{rank}/environ").read_bytes():
            os.kill(rank, signal.SIGKILL)
    processes.end_sessions({*below, lost.pid}, grace=0.0)
    lost.wait()
    job.restarted(1)
    cluster.daemon("two", ["slurmd", "-D", "-N", "two"])
    job.wait("COMPLETED")
    equal(job.weights(), uninterrupted)
