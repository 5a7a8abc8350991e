"""A Slurm of our own: controller, two node names on this machine, munge, all on private ports."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from l2vit.launch import processes

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel")
CONFIG = """
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=300
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=one NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=two NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=one,two Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=one,two MaxTime=60 State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root"
    search = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    return f"needs {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else ""


def free_ports(count: int) -> list[int]:
    """So many ports nobody listens on."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in made:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in made]


class Slurm:
    """Daemons and commands of the private cluster."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        for node in ("one", "two"):
            (folder / f"spool-{node}").mkdir()
        config = CONFIG.format(host=socket.gethostname(), folder=folder, ports=free_ports(3))
        (folder / "slurm.conf").write_text(config)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
        munge += [f"--key-file={folder}/munge.key", f"--pid-file={folder}/munge.pid"]
        munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
        self.daemon("munged", munge)
        while not (folder / "munge.socket").exists():
            self.alive("munged")
            time.sleep(0.1)
        self.daemon("slurmctld", ["slurmctld", "-D", "-i"])
        for node in ("one", "two"):
            self.daemon(node, ["slurmd", "-D", "-N", node])
        while self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() != ["idle", "idle"]:
            self.alive(*self.daemons)
            time.sleep(0.3)

    def daemon(self, name: str, command: list[str]) -> None:
        log = (self.folder / f"{name}.out").open("a")
        self.daemons[name] = subprocess.Popen(
            command,
            env=self.environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        log.close()

    def alive(self, *names: str) -> None:
        for name in names:
            said = (self.folder / f"{name}.out").read_text()[-2000:]
            assert self.daemons[name].poll() is None, f"{name} ended: {said}"

    def run(self, *command: str, check: bool = False, **options) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, **options
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def stop(self) -> None:
        self.run("scancel", "--full", "--state=RUNNING")
        for process in reversed(self.daemons.values()):
            below = processes.sessions_below(process.pid)
            processes.end_sessions({*below, process.pid}, grace=3.0)
            process.wait()

    def state(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def begin_now(self, job: str) -> None:
        """A requeued job waits two minutes by itself; here a few seconds.

        At once would be too early: its nodes refuse the credential of the start that just ended.
        """
        state = self.state(job)
        if state["JobState"] == "PENDING" and state["Reason"] == "BeginTime":
            time.sleep(4.0)
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
