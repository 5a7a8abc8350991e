"""The ranks of one node: started, watched, signalled, ended, and their deaths explained."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from l2vit.launch import memory, processes
from l2vit.train.run_lock import RUN_ID

STORE_FD = "L2VIT_STORE_FD"
TOKEN = "L2VIT_TOKEN"


@dataclass(frozen=True)
class Share:
    """What one node does of a run: plain data, sent to other nodes as JSON."""

    argv: list[str]
    """The command of a rank."""
    environment: dict[str, str]
    """Beside the variables that tell a rank its number."""
    first_rank: int
    ranks: int
    world_size: int
    master_address: str
    master_port: int
    hang_seconds: float = 0.0
    """Ranks that somebody stopped (SIGSTOP) for so long are given up; 0: never."""
    devices: str = ""
    """CUDA_VISIBLE_DEVICES of this node, if not all."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit status (negative: a signal's number) and why, if known."""

    rank: int
    status: int
    why: str = ""


class LocalRanks:
    """The rank processes of this node.

    Each lives in a session of its own, so that a signal to the terminal's group does not reach it
    and whatever it leaves behind can be found.
    """

    def __init__(
        self,
        share: Share,
        *,
        store: int | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> None:
        """Start the ranks.

        Args:
            share: which ranks, and how.
            store: descriptor of the listening socket for rank 0.
            stdout: where the ranks' output goes; None: where ours goes.
            stderr: likewise.
        """
        self._share = share
        self._memory = memory.Kills()
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: dict[int, Ended] = {}
        self._stopped_since: dict[int, float] = {}
        self._looked = 0.0
        for local in range(share.ranks):
            rank = share.first_rank + local
            kept = (store,) if rank == 0 and store is not None else ()
            self._ranks[rank] = subprocess.Popen(
                share.argv,
                env=self._environment(local, kept),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=kept,
                start_new_session=True,
            )

    def _environment(self, local: int, kept: tuple[int, ...]) -> dict[str, str]:
        share = self._share
        numbers = {
            "RANK": share.first_rank + local,
            "LOCAL_RANK": local,
            "WORLD_SIZE": share.world_size,
            "LOCAL_WORLD_SIZE": share.ranks,
            "LOCAL_SIZE": share.ranks,
            "MASTER_ADDR": share.master_address,
            "MASTER_PORT": share.master_port,
        }
        more = {STORE_FD: str(kept[0])} if kept else {}
        if share.devices:
            more["CUDA_VISIBLE_DEVICES"] = share.devices
        return share.environment | {key: str(value) for key, value in numbers.items()} | more

    def poll(self) -> list[Ended]:
        """The ranks that ended since the last call."""
        fresh = []
        for rank, process in self._ranks.items():
            if rank not in self._ended and (status := process.poll()) is not None:
                self._ended[rank] = Ended(rank, status, self._why(process.pid, status))
                fresh.append(self._ended[rank])
        self._end_stopped()
        return fresh

    def _why(self, pid: int, status: int) -> str:
        return self._memory.explain(pid) if status == -signal.SIGKILL else ""

    def _end_stopped(self) -> None:
        """Kill ranks that are stopped (SIGSTOP, a debugger): nobody else may notice them."""
        now = time.monotonic()
        if self._share.hang_seconds <= 0 or now < self._looked + 1.0:
            return
        # A machine that was suspended must not look like ranks that stood still meanwhile.
        late = max(0.0, now - self._looked - 5.0) if self._looked else 0.0
        self._looked = now
        for rank in self.alive:
            process = self._ranks[rank]
            if not processes.is_stopped(process.pid):
                self._stopped_since.pop(rank, None)
                continue
            since = self._stopped_since.setdefault(rank, now) + late
            self._stopped_since[rank] = since
            if now - since > self._share.hang_seconds:
                process.kill()

    @property
    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank in self._ranks if rank not in self._ended]

    def send(self, number: int) -> None:
        """Send a signal to each rank that is still there."""
        self.poll()
        processes.send((self._ranks[rank].pid for rank in self.alive), number)

    def end(self, *, grace: float) -> tuple[int, list[int]]:
        """End what is left of the ranks and of the processes they started.

        Returns:
            How many processes were left, and which could not be ended.
        """
        sessions = {process.pid for process in self._ranks.values()}
        left, held = processes.end_sessions(sessions, grace=grace)
        for process in self._ranks.values():
            if process.pid not in held:
                process.wait()
        self.poll()
        return left, held


def end_earlier(run_id: str, *, grace: float = 5.0) -> int:
    """End what an earlier start of this very run left on this node, this process excepted.

    Returns:
        How many processes there were.
    """
    return processes.end_marked(f"{RUN_ID}={run_id}".encode(), grace=grace, spare=os.getpid())


def describe(ended: Sequence[Ended], hosts: Mapping[int, str]) -> str:
    """One line about ranks that failed, the first of them by name."""
    first = ended[0]
    where = f" on {hosts[first.rank]}" if hosts.get(first.rank) else ""
    more = f" (and {len(ended) - 1} more)" if len(ended) > 1 else ""
    if first.status >= 0:
        return f"rank {first.rank}{where}{more} ended with status {first.status}"
    name = signal.Signals(-first.status).name
    reason = f": {first.why}" if first.why else ""
    return f"rank {first.rank}{where}{more} was killed by {name}{reason}"
