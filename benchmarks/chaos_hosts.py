"""The hosts that ``chaos.py`` disturbs: forked supervisors with forked ranks, nothing pretended.

A host is a process with the launcher's own supervisor in it. Its ranks run the program's own
``main``. Only starting differs: they are forked from a process that has PyTorch and DeepSpeed
loaded, which takes a second where starting Python takes ten.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked_ranks import free_port
from namespaces import Hosts

from l2vit.launch import processes, ranks
from l2vit.launch.hosts import Node
from l2vit.launch.job import Job
from l2vit.launch.rank import run as run_rank
from l2vit.launch.supervisor import Supervisor
from l2vit.train import checkpoint, run_dir
from l2vit.train.run_dir import Reached

DISK_BYTES = 96 << 20
_STARTED = "2 ranks on cpu"
_RESUMED = re.compile(r"continuing from \S*/step-(\d{8}) at step")
_NETWORK = 0x40000000  # CLONE_NEWNET
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def prepare() -> None:
    """Load what every rank needs, before anything is forked."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import preloaded  # noqa: F401

    torch.set_num_threads(1)


class Forked:
    """A forked child with the interface of ``subprocess.Popen`` that the launcher uses."""

    def __init__(self, body: Callable[[], int], log: Path | None = None, kept: Any = None) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self._settle(log, kept)
                status = body()
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(status)

    @staticmethod
    def _settle(log: Path | None, kept: Any) -> None:
        os.setsid()
        for number in _HANDLED:
            signal.signal(number, signal.SIG_DFL)
        if log is not None:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            sys.stderr = os.fdopen(2, "w", buffering=1)
        if kept is not None:
            opened = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
            for descriptor in {number for number in opened if number > 2} - set(kept):
                with contextlib.suppress(OSError):
                    os.close(descriptor)

    def poll(self) -> int | None:
        """The exit status once the process has ended."""
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self) -> int:
        """Wait for the end."""
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _start_rank(argv: list[str], *, env: dict[str, str], pass_fds: Any, **_: Any) -> Forked:
    """What the launcher calls in place of ``subprocess.Popen``; ``argv`` is a rank's command."""

    def body() -> int:
        os.environ.clear()
        os.environ.update(env)
        return run_rank("pretrain.train", argv[3:])

    return Forked(body, kept=pass_fds)


@dataclass(frozen=True)
class Place:
    """Where a host is."""

    address: str
    namespace: str = ""


class Run:
    """A run on one host with two ranks, or on two hosts with one each."""

    def __init__(
        self,
        config: Path,
        disk: Path,
        places: list[Place],
        length: str,
        *,
        shards: Path,
        wire: Hosts | None,
    ) -> None:
        self.config, self.disk, self.hosts, self.length = config, disk, places, length
        self.shards, self.wire = shards, wire
        self.directory = disk / "run"
        self.port = free_port()
        self._supervisors: list[Forked | None] = [None] * len(places)
        self._left: set[int] = set()
        """Ranks whose supervisor was killed: until they are gone nobody starts the host again."""
        self.mounted = False

    def __enter__(self) -> Run:
        if os.geteuid() == 0:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(self.disk)]
            self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        for host in range(len(self.hosts)):
            self.kill_host(host)
        while any(map(processes.find, self._left)):
            time.sleep(0.05)
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)

    # -- starting

    def start_ended(self) -> None:
        """Start each host whose supervisor has ended, once its ranks are gone, too."""
        self._left = {pid for pid in self._left if processes.find(pid) is not None}
        for host, process in enumerate(self._supervisors):
            ended = process is None or process.poll() is not None
            if ended and not self._left and not self.finished():
                self._supervisors[host] = Forked(lambda host=host: self._be(host), self.log(host))

    def _be(self, host: int) -> int:
        if namespace := self.hosts[host].namespace:
            with Path(f"/run/netns/{namespace}").open() as opened:
                if ctypes.CDLL(None, use_errno=True).setns(opened.fileno(), _NETWORK) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        ranks.subprocess = types.SimpleNamespace(  # type: ignore[assignment]
            Popen=_start_rank, DEVNULL=subprocess.DEVNULL
        )
        supervisor = Supervisor(
            self.directory, (self.length, "0 epochs"), max_restarts=1000, backoff=0.3
        )
        return supervisor.run(self._job(host))

    def _job(self, host: int) -> Job:
        two = len(self.hosts) == 2
        slots = (0,) if two else (0, 1)
        arguments = ["--config", str(self.config), f"run.dir={self.directory}"]
        return Job(
            argv=[sys.executable, "-u", "launch/pretrain.sh", *arguments],
            environment=dict(os.environ),
            nodes=[Node(place.address, slots) for place in self.hosts],
            here=host,
            master_address=self.hosts[0].address,
            master_port=self.port if two else 0,
            hang_seconds=8.0,
        )

    # -- looking

    def log(self, host: int) -> Path:
        """What a host and its ranks print."""
        return self.disk.with_suffix(f".{host}.log")

    def said(self) -> str:
        """What all hosts have printed so far, the first host's first."""
        return self.said_since([0] * len(self.hosts))

    def mark(self) -> list[int]:
        """How much each host has printed."""
        return [len(self._log_of(host)) for host in range(len(self.hosts))]

    def said_since(self, mark: list[int]) -> str:
        """What the hosts have printed since ``mark``."""
        return "".join(self._log_of(host)[size:] for host, size in enumerate(mark))

    def _log_of(self, host: int) -> str:
        path = self.log(host)
        return path.read_text(errors="replace") if path.exists() else ""

    def reached(self) -> Reached:
        """How far the run has come."""
        with contextlib.suppress(OSError):  # a checkpoint that is just being deleted
            return run_dir.reached(self.directory)
        return self.reached()

    def finished(self) -> bool:
        """Whether DONE is there and nobody is at work any more."""
        done = run_dir.finished(self.directory, (self.length, "0 epochs"))
        return done and all(p is None or p.poll() is not None for p in self._supervisors)

    def resumed_at(self, mark: list[int]) -> int | None:
        """The step the newest start since ``mark`` continued from; None: nothing was started."""
        _, started, told = self._log_of(0)[mark[0] :].rpartition(_STARTED)
        found = _RESUMED.search(told)
        return (int(found[1]) if found else 0) if started else None

    def rank_pids(self, host: int) -> list[int]:
        """The rank processes that the host's supervisor has now."""
        process = self._supervisors[host]
        if process is None or process.poll() is not None:
            return []
        return [found.pid for found in processes.living() if found.parent == process.pid]

    def all_ranks(self) -> list[int]:
        """The rank processes of all hosts."""
        return [pid for host in range(len(self.hosts)) for pid in self.rank_pids(host)]

    # -- disturbing

    def signal_supervisor(self, host: int, number: int) -> None:
        """Send a signal to a host's supervisor alone."""
        process = self._supervisors[host]
        if process is not None and process.poll() is None:
            if number == signal.SIGKILL:
                self._left |= set(self.rank_pids(host))
            os.kill(process.pid, number)

    def kill_host(self, host: int) -> None:
        """SIGKILL to the supervisor and its ranks, as when the power fails."""
        pids = self.rank_pids(host)
        self.signal_supervisor(host, signal.SIGKILL)
        processes.send(pids, signal.SIGKILL)
        process = self._supervisors[host]
        if process is not None:
            process.wait()

    def kill_all(self) -> None:
        """The power fails everywhere."""
        for host in range(len(self.hosts)):
            self.kill_host(host)
        while any(map(processes.find, self._left)):
            time.sleep(0.01)

    def newest(self) -> Path:
        """The newest complete checkpoint."""
        return checkpoint.step_directory(self.directory, self.reached().saved)

    def await_word(self, word: str, mark: list[int], *, seconds: float = 120.0) -> bool:
        """Keep the hosts going until one says ``word``; False when it has not in time."""
        until = time.monotonic() + seconds
        while word not in self.said_since(mark):
            if time.monotonic() > until or self.finished():
                return False
            self.start_ended()
            time.sleep(0.02)
        return True
