"""Names the rank that hangs, and what it was doing, instead of leaving a silent job.

A thread on each rank posts where its rank is (``PhaseClock.place``) to a small key-value store
of its own. Ranks pass the same phases in the same order, so of ranks that all stand still the
one that has come least far is the cause and the others are waiting for it.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Sequence

import torch.distributed as dist

from l2vit.train.clock import PhaseClock, Place
from l2vit.train.distributed import World

EXIT_STATUS = 1
_ANSWER = datetime.timedelta(seconds=5)


def culprits(places: Sequence[Place | None]) -> list[int]:
    """Ranks that hold up the others: those without an answer, else those that came least far."""
    silent = [rank for rank, place in enumerate(places) if place is None]
    if silent:
        return silent
    least = min(place.count for place in places if place is not None)
    return [rank for rank, place in enumerate(places) if place is not None and place.count == least]


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
            server = dist.TCPStore(host, 0, None, True, _ANSWER, wait_for_workers=False)
        port = self._world.broadcast(server.port if server is not None else 0)
        return server or dist.TCPStore(host, port, None, False, _ANSWER, wait_for_workers=False)

    def _watch(self) -> None:
        beat = min(1.0, self._limit / 8)
        while not self._stop.wait(beat):
            place, standing = self._clock.place()
            self._post(place)
            # Setup has phases of its own length: imports, compilation, a slow first batch.
            if standing > self._limit and place.phase != "setup":
                self._report(standing, patience=4 * beat)

    def _post(self, place: Place) -> None:
        try:
            text = f"{place.count} {place.phase} {place.step} {time.time()}"
            self._store.set(f"place/{self._world.rank}", text)
        except RuntimeError:  # rank 0, which keeps the store, is the one that is gone
            pass

    def _report(self, standing: float, *, patience: float) -> None:
        places = [self._place_of(rank, patience) for rank in range(self._world.size)]
        guilty = culprits(places)
        free = [rank for rank in range(self._world.size) if rank not in guilty]
        if self._world.rank == (free or [0])[0]:
            line = f"error: {describe(places, standing)}; stopping (faults.hang_seconds)"
            print(line, file=sys.stderr, flush=True)
        if self._world.rank in guilty:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if not self._stop.wait(2 * patience):  # let the rank that reports be heard
            os._exit(EXIT_STATUS)

    def _place_of(self, rank: int, patience: float) -> Place | None:
        try:
            if not self._store.check([f"place/{rank}"]):
                return None
            count, phase, step, posted = self._store.get(f"place/{rank}").decode().split()
        except RuntimeError:
            return None
        if time.time() - float(posted) > patience + self._limit / 2:
            return None
        return Place(int(count), phase, int(step))
