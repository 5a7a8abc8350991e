"""The launcher over real ssh: daemons in two network namespaces, two real ranks."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_runs
import torch
from miniature import MINIATURE, NASTY, equal, kept_whole
from namespaces import Hosts

from l2vit.launch import processes
from l2vit.train import checkpoint
from l2vit.train.run_dir import reached

ROOT = Path(__file__).parents[2]
PORT = "2222"
SSHD = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")
MISSING = "needs root" if os.geteuid() != 0 else ""
MISSING = MISSING or ("" if SSHD and shutil.which("ssh") else "needs sshd (openssh-server)")
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
SMALL = {**MINIATURE, "faults__hang_seconds": 12}
SERVER = """
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
PidFile none
"""
CLIENT = """
Host *
  Port {port}
  User root
  IdentityFile {folder}/user_key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssh")
    two, daemons = Hosts(), []
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host_key", "user_key"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(make, check=True)
    for name, text in (("server", SERVER), ("client", CLIENT)):
        (folder / name).write_text(text.format(port=PORT, folder=folder))
    try:
        two.make()
        for name in two.names:
            command = ["ip", "netns", "exec", name, SSHD, "-D", "-e", "-f", str(folder / "server")]
            daemons.append(subprocess.Popen(command, start_new_session=True))
        two.client, two.spared = folder / "client", {daemon.pid for daemon in daemons}
        yield two
    finally:
        for daemon in daemons:
            below = processes.sessions_below(daemon.pid)
            processes.end_sessions({*below, daemon.pid}, grace=1.0)
            daemon.wait()
        two.remove()


class Launched:
    """``bash launch/pretrain.sh --hostfile ...`` on one of the hosts, the first by default."""

    def __init__(self, hosts: Hosts, run: Path, shards: Path, *arguments: str, host: int = 0):
        self.run, self.log = run, run.with_suffix(f".{host}.log")
        self.mark = f"L2VIT_TEST={run}"
        hostfile = run.with_suffix(".hosts")
        hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
        command = ["ip", "netns", "exec", hosts.names[host]]
        command += ["bash", str(ROOT / "launch/pretrain.sh"), "--hostfile", str(hostfile)]
        if "--no_ssh" not in arguments:
            command += ["--ssh_args", f"-F {hosts.client}"]
        command += ["--config", str(small_runs.settings(shards, run, **SMALL)), *arguments]
        own = {"VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        name, _, value = self.mark.partition("=")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | own | {name: value},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        processes.end_session(self.process.pid, grace=5.0)
        self.process.wait()
        processes.end_marked(self.mark.encode(), grace=5.0, spare=os.getpid())

    def wait_for_step(self, step: int) -> None:
        while reached(self.run).saved <= step:
            assert self.process.poll() is None, self.said()
            time.sleep(0.1)

    def wait_for_word(self, word: str) -> None:
        while word not in self.said():
            assert self.process.poll() is None, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        return self.log.read_text()

    def kill(self, chosen) -> None:
        """SIGKILL to this launch's processes whose environment, a list, is ``chosen``."""
        for process in processes.marked(self.mark.encode()):
            with contextlib.suppress(OSError):
                found = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if chosen(found):
                    os.kill(process.pid, signal.SIGKILL)

    def nothing_left(self) -> None:
        while left := processes.marked(self.mark.encode()):
            assert all(process.pid != self.process.pid for process in left)
            time.sleep(0.2)

    def weights(self) -> dict[str, torch.Tensor]:
        return checkpoint.read_weights(checkpoint.find(self.run), "raw")


@pytest.fixture(scope="module")
def uninterrupted(hosts, shards, tmp_path_factory):
    """The final weights of a plain run, started with every character of a shell's."""
    run = tmp_path_factory.mktemp("plain") / "run"
    with Launched(hosts, run, shards, NASTY, "about.command=") as job:
        assert job.process.wait() == 0, job.said()
        job.nothing_left()
        kept_whole(run)
        return job.weights()


def test_stopped_by_a_signal_and_continued(hosts, shards, uninterrupted, tmp_path):
    """Nobody else's processes end, not even those that look like DeepSpeed's launcher."""
    sleeper = ["bash", "-c", "exec -a 'python -u -m deepspeed.launcher.launch' sleep 1000"]
    other = subprocess.Popen(sleeper)
    try:
        with Launched(hosts, tmp_path / "run", shards) as job:
            job.wait_for_step(3)
            job.process.send_signal(signal.SIGTERM)
            assert job.process.wait() == 75, job.said()
            job.nothing_left()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    with Launched(hosts, tmp_path / "run", shards) as job:
        assert job.process.wait() == 0, job.said()
        equal(job.weights(), uninterrupted)


def test_two_launches_side_by_side(hosts, shards, uninterrupted, tmp_path):
    """One loses its supervisor, the other all it has on a host; neither hears of the other."""
    patient = ("--max-restarts", "2", "--backoff", "0.5")
    with (
        Launched(hosts, tmp_path / "one", shards) as one,
        Launched(hosts, tmp_path / "two", shards, *patient) as two,
    ):
        one.wait_for_step(3)
        one.process.kill()
        one.process.wait()
        one.nothing_left()
        two.wait_for_step(3)
        hosts.kill_all_on(1)
        assert two.process.wait() == 0, two.said()
        assert f"lost {hosts.addresses[1]}: the connection ended" in two.said()
        assert "restart 1 of 2" in two.said()
        two.nothing_left()
        equal(two.weights(), uninterrupted)
    with Launched(hosts, tmp_path / "one", shards) as one:
        assert one.process.wait() == 0, one.said()
        assert "continuing from" in one.said()
        one.nothing_left()
        equal(one.weights(), uninterrupted)


def test_a_rank_killed_on_the_other_host_is_started_again(hosts, shards, uninterrupted, tmp_path):
    arguments = ("--max-restarts", "2", "--backoff", "0.5")
    with Launched(hosts, tmp_path / "run", shards, *arguments) as job:
        job.wait_for_step(3)
        job.kill(lambda found: b"RANK=1" in found)
        assert job.process.wait() == 0, job.said()
        assert f"rank 1 on {hosts.addresses[1]} was killed by SIGKILL" in job.said()
        equal(job.weights(), uninterrupted)


def test_a_link_cut_and_back(hosts, shards, uninterrupted, tmp_path):
    arguments = ("--max-restarts", "1", "--backoff", "0.5", "--lease", "6")
    with Launched(hosts, tmp_path / "run", shards, *arguments) as job:
        job.wait_for_step(3)
        hosts.wire("down")
        try:
            job.wait_for_word("no failure of the run: trying again")
        finally:
            hosts.wire("up")
        assert job.process.wait() == 0, job.said()
        assert f"lost {hosts.addresses[1]}: nothing came from it for 6 s" in job.said()
        equal(job.weights(), uninterrupted)


def test_without_ssh_each_host_restarts_its_own(hosts, shards, uninterrupted, tmp_path):
    with contextlib.ExitStack() as stack:
        both = []
        for node in (0, 1):
            arguments = ["--no_ssh", "--node_rank", str(node), "--master_addr", hosts.addresses[0]]
            arguments += ["--max-restarts", "3", "--backoff", "0.5"]
            job = Launched(hosts, tmp_path / "run", shards, *arguments, host=node)
            both.append(stack.enter_context(job))
        both[0].wait_for_step(3)
        both[0].kill(lambda found: b"RANK=1" in found)
        assert [job.process.wait() for job in both] == [0, 0], both[0].said() + both[1].said()
        assert "rank 1 on" in both[1].said() or "rank 1 was killed by SIGKILL" in both[1].said()
        assert "restart 1 of 3" in both[1].said()
        both[0].nothing_left()
        equal(both[0].weights(), uninterrupted)
