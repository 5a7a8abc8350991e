"""One start of a run's ranks on all its nodes, watched until the last of them has ended."""

from __future__ import annotations

import concurrent.futures
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from l2vit.launch import ranks, remote
from l2vit.launch.job import Job
from l2vit.launch.ranks import Ended, LocalRanks
from l2vit.launch.remote import RemoteNode
from l2vit.train import rendezvous
from l2vit.train.guards import STOPPED

FAILED, WRONG_CONFIGURATION = 1, 2
UNREACHABLE = rendezvous.UnreachablePeers.exit_status
DEATH_GRACE = 60.0
"""Seconds the other ranks have to end by themselves once one has ended."""
CONNECTING = 180.0
"""Seconds all nodes' agents have to answer."""
POLL = 0.1


@dataclass(frozen=True)
class Outcome:
    """How a start ended."""

    status: int
    """0, 2, 69 (peers not reached), 75, negative where signals ended the ranks, else 1."""
    why: str = ""
    refused: bool = False
    """A node refuses us: waiting does not mend that."""


class Watched(Protocol):
    """A node's ranks, here or elsewhere."""

    lost: str

    def poll(self) -> list[Ended]:
        """The ranks that ended since the last call."""

    def send(self, number: int) -> None:
        """Send a signal to each rank."""

    def end(self, *, grace: float) -> tuple[int, list[int]]:
        """End what is left; how many processes that were, and which are held by the kernel."""


class LocalNode(LocalRanks):
    """This node's ranks; a node that runs us is never lost."""

    lost = ""


@dataclass
class Attempt:
    """One start. ``signals`` grows when a signal arrives; its end is the attempt's last word."""

    job: Job
    signals: Sequence[int]
    stop_grace: float
    say: Callable[[str], None]
    on_signal: Callable[[], None] = lambda: None
    """Called before a signal is passed to the ranks."""
    _nodes: list[Watched] = field(default_factory=list)
    _ended: dict[int, Ended] = field(default_factory=dict)
    _lost: dict[int, str] = field(default_factory=dict)

    def run(self) -> Outcome:
        """Start the ranks, watch them to their end, leave nothing behind."""
        try:
            problem = self._start()
            if problem is not None:
                return problem
            return self._watch()
        finally:
            self._end()

    # -- starting

    def _start(self) -> Outcome | None:
        job = self.job
        if job.here is None:
            return self._start_remote()
        store, port = None, job.master_port
        if len(job.nodes) == 1:
            store = rendezvous.listen(job.master_address, port)
            port = store.getsockname()[1]
        share = job.share(job.here, job.master_address, port)
        try:
            descriptor = store.fileno() if store is not None else None
            self._nodes = [LocalNode(share, store=descriptor)]
        finally:
            if store is not None:
                store.close()
        return None

    def _start_remote(self) -> Outcome | None:
        job = self.job
        nodes = [
            RemoteNode(n.host, remote.command(n.host, ssh_arguments=job.ssh_arguments), job.lease)
            for n in job.nodes
        ]
        for node in nodes:
            node.connect()
            self._nodes.append(node)
        if (problem := self._await(nodes, "hello")) is not None:
            return problem
        address = job.master_address or remote.address_of(nodes)
        for number, node in enumerate(nodes):
            where = address if number == 0 else None
            node.prepare(run_id=job.run_id, address=where, port=job.master_port)
        if (problem := self._await(nodes, "ready")) is not None:
            return problem
        assert nodes[0].ready is not None
        port = int(nodes[0].ready["port"])
        for number, node in enumerate(nodes):
            node.start(job.share(number, address, port))
        return None

    def _await(self, nodes: Sequence[RemoteNode], word: str) -> Outcome | None:
        """Wait until every node has said ``word``; an outcome if one cannot be reached."""
        until = time.monotonic() + CONNECTING
        while missing := [node for node in nodes if getattr(node, word) is None]:
            for node in nodes:
                node.poll()
            if self.signals:
                return Outcome(-signal.SIGTERM)
            late = time.monotonic() > until
            for node in missing:
                if node.lost or late:
                    why = node.lost or f"no answer for {CONNECTING:g} s"
                    return Outcome(UNREACHABLE, f"{node.host}: {why}", refused=node.refused)
            time.sleep(0.05)
        return None

    # -- watching

    def _watch(self) -> Outcome:
        passed, deadline = 0, float("inf")
        while not self._over():
            now = time.monotonic()
            if len(self.signals) > passed:
                deadline = min(deadline, now + (self.stop_grace if passed == 0 else 5.0))
                passed = len(self.signals)
                self._pass_signal()
            if self._look():
                deadline = min(deadline, now + DEATH_GRACE)
            if now > deadline:
                self.say("the ranks did not end in time; killing them")
                return self._outcome(killed=True)
            time.sleep(POLL)
        return self._outcome(killed=False)

    def _over(self) -> bool:
        count = sum(len(node.slots) for node in self.job.nodes)
        if self.job.here is not None:
            count = len(self.job.nodes[self.job.here].slots)
        gone = sum(len(self.job.nodes[index].slots) for index in self._lost)
        early = sum(1 for rank in self._ended if self._node_of(rank) in self._lost)
        return len(self._ended) + gone - early >= count

    def _look(self) -> bool:
        """Take what happened since the last look; whether some rank ended or a node was lost."""
        news = False
        for index, node in enumerate(self._nodes):
            for ended in node.poll():
                self._ended[ended.rank] = ended
                news = True
                if ended.status == -signal.SIGKILL:
                    self.say(ranks.describe([ended], self._hosts()))
            if node.lost and index not in self._lost:
                self._lost[index] = node.lost
                news = True
                self.say(f"lost {self.job.nodes[index].host}: {node.lost}")
        return news

    def _pass_signal(self) -> None:
        self.on_signal()
        name = signal.Signals(self.signals[-1]).name
        self.say(f"{name} received; passing it to the ranks")
        for node in self._nodes:
            node.send(signal.SIGTERM)

    def _hosts(self) -> Mapping[int, str]:
        if len(self.job.nodes) == 1:
            return {}
        placed = [node.host for node in self.job.nodes for _ in node.slots]
        return dict(enumerate(placed))

    def _node_of(self, rank: int) -> int:
        if self.job.here is not None:
            return 0
        for index, node in enumerate(self.job.nodes):
            rank -= len(node.slots)
            if rank < 0:
                return index
        return -1

    def _outcome(self, *, killed: bool) -> Outcome:
        failed = [ended for ended in self._ended.values() if ended.status not in (0, STOPPED)]
        if any(ended.status == WRONG_CONFIGURATION for ended in failed):
            return Outcome(WRONG_CONFIGURATION)
        if self._lost:
            hosts = ", ".join(self.job.nodes[index].host for index in self._lost)
            return Outcome(UNREACHABLE, f"lost {hosts}")
        own = [ended for ended in failed if ended.status != UNREACHABLE]
        if own:
            only_signals = all(ended.status < 0 for ended in own)
            why = ranks.describe(own, self._hosts())
            return Outcome(own[0].status if only_signals else FAILED, why)
        if failed:
            return Outcome(UNREACHABLE, ranks.describe(failed, self._hosts()))
        if killed:
            return Outcome(FAILED, "ranks had to be killed")
        stopped = any(ended.status == STOPPED for ended in self._ended.values())
        return Outcome(STOPPED if stopped else 0)

    # -- ending

    def _end(self) -> None:
        if not self._nodes:
            return
        with concurrent.futures.ThreadPoolExecutor(len(self._nodes)) as pool:
            results = list(pool.map(lambda node: node.end(grace=5.0), self._nodes))
        left, held = sum(r[0] for r in results), [pid for r in results for pid in r[1]]
        if held:
            pids = ", ".join(map(str, held))
            self.say(f"cannot end process {pids}: it waits for a disk or device (ps: state D)")
        elif left:
            self.say(f"ended {left} process(es) the ranks had left behind")
