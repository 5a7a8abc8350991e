"""Names the rank that hangs, and what it was doing, instead of leaving a silent job.

A thread on each rank posts where its rank is (``PhaseClock.place``) to a small key-value store
of its own. Ranks pass the same phases in the same order, so of ranks that all stand still the
one that has come least far is the cause and the others are waiting for it; within one phase, a rank
that stands in a collective waits and is not the cause.
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

import torch.distributed as dist

from l2vit import cli
from l2vit.train import rendezvous
from l2vit.train.distributed import World, wait_for_ranks
from l2vit.train.throughput import PhaseClock, Place

_WAITING = wait_for_ranks.__code__
EXIT_STATUS = 1
_ANSWER = datetime.timedelta(seconds=5)
_UNANSWERED = 20.0
"""Seconds the ordinary report gets before the process ends without it."""


def culprits(places: Sequence[Place | None]) -> list[int]:
    """Ranks that hold up the others: those without an answer, else those that came least far."""
    silent = [rank for rank, place in enumerate(places) if place is None]
    if silent:
        return silent
    present = [(rank, place) for rank, place in enumerate(places) if place is not None]
    least = min(place.count for _, place in present)
    behind = [(rank, place) for rank, place in present if place.count == least]
    acting = [rank for rank, place in behind if not place.waiting]
    return acting or [rank for rank, _ in behind]


def in_collective() -> bool:
    """Whether some thread of this process waits for other ranks: in a call of torch.distributed, or
    for what one has begun."""
    own = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        at: FrameType | None = frame
        while at is not None and thread != own:
            called = at.f_code
            if called.co_filename == dist.distributed_c10d.__file__ or called is _WAITING:
                return True
            at = at.f_back
    return False


def describe(places: Sequence[Place | None], seconds: float) -> str:
    """One line that names the ranks at fault."""
    guilty = culprits(places)
    if len(guilty) == len(places) > 1:
        place = places[0]
        where = f"phase {place.phase} of step {place.step}" if place else "an unknown phase"
        return f"no rank made progress for {seconds:.0f} s: all are in {where} (network?)"
    named = []
    for rank in guilty:
        place = places[rank]
        where = f"in phase {place.phase} of step {place.step}" if place else "and does not answer"
        named.append(f"rank {rank} made no progress for {seconds:.0f} s {where}")
    return "; ".join(named)


class Watchdog:
    """Watches this rank's clock; ends the process when progress stops for ``limit`` seconds."""

    def __init__(self, clock: PhaseClock, *, world: World, limit: float) -> None:
        self._clock, self._world, self._limit = clock, world, limit
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if limit > 0:
            self._store = self._open_store()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
            threading.Thread(target=self._last_resort, name="last-resort", daemon=True).start()

    def close(self) -> None:
        """End the watch."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _open_store(self) -> dist.Store:
        if self._world.size == 1:
            return dist.HashStore()
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        server = None
        if self._world.main:
            fd = rendezvous.listen("" if self._across_hosts(host) else host).detach()
            server = dist.TCPStore(
                host, 0, None, True, _ANSWER, wait_for_workers=False, master_listen_fd=fd
            )
        port = self._world.broadcast(server.port if server is not None else 0)
        return server or dist.TCPStore(host, port, None, False, _ANSWER, wait_for_workers=False)

    def _across_hosts(self, host: str) -> bool:
        """Whether ``host`` is a loopback address although there are other hosts."""
        return self._world.size > self._world.local_size and rendezvous.is_loopback(host)

    def _beats(self, beat: float) -> Iterator[tuple[Place, float]]:
        """Every ``beat`` seconds, where the rank is and how long it has stood there.

        Counted in beats that came on time: while a machine is suspended or gives this process no
        core the clock goes on, and that is no proof that a rank hangs.
        """
        counted, lived, before = -1, 0.0, time.monotonic()
        while not self._stop.wait(beat):
            place, standing = self._clock.place()
            now = time.monotonic()
            lived = min(now - before, 2 * beat) + (lived if place.count == counted else 0.0)
            counted, before = place.count, now
            yield place, min(standing, lived)

    def _watch(self) -> None:
        beat = min(1.0, self._limit / 8)
        for place, standing in self._beats(beat):
            waiting = standing > self._limit / 2 and in_collective()
            self._post(dataclasses.replace(place, waiting=waiting))
            # Setup has phases of its own length: imports, compilation, a slow first batch.
            if standing > self._limit and place.phase != "setup":
                self._report(standing, patience=4 * beat)

    def _last_resort(self) -> None:
        """End the process although the store does not answer: a dead link blocks its calls."""
        beat = min(1.0, self._limit / 8)
        longest = self._limit + max(16 * beat, _UNANSWERED)
        for place, standing in self._beats(beat):
            if standing > longest and place.phase != "setup":
                cli.tell(
                    f"error: rank {self._world.rank} made no progress for {standing:.0f} s in phase"
                    f" {place.phase} of step {place.step} and cannot reach rank 0 (network?);"
                    " stopping (faults.hang_seconds)",
                    error=True,
                )
                os._exit(EXIT_STATUS)

    def _post(self, place: Place) -> None:
        try:
            text = f"{place.count} {place.phase} {place.step} {int(place.waiting)} {time.time()}"
            self._store.set(f"place/{self._world.rank}", text)
        except RuntimeError:  # rank 0, which keeps the store, is the one that is gone
            pass

    def _report(self, standing: float, *, patience: float) -> None:
        places = [self._place_of(rank, patience) for rank in range(self._world.size)]
        guilty = culprits(places)
        free = [rank for rank in range(self._world.size) if rank not in guilty]
        if self._world.rank == (free or [0])[0]:
            line = f"error: {describe(places, standing)}; stopping (faults.hang_seconds)"
            cli.tell(line, error=True)
        if self._world.rank in guilty:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if not self._stop.wait(2 * patience):  # let the rank that reports be heard
            os._exit(EXIT_STATUS)

    def _place_of(self, rank: int, patience: float) -> Place | None:
        try:
            if not self._store.check([f"place/{rank}"]):
                return None
            fields = self._store.get(f"place/{rank}").decode().split()
            count, phase, step, waiting, posted = fields
        except RuntimeError:
            return None
        if time.time() - float(posted) > patience + self._limit / 2:
            return None
        return Place(int(count), phase, int(step), waiting == "1")
