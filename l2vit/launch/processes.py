"""Processes, read from /proc: those of a session or with a mark, and ending them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

KILLED = 30.0
"""Seconds in which a killed process is gone unless the kernel holds it."""


@dataclass(frozen=True)
class Process:
    """One living process."""

    pid: int
    parent: int
    session: int


def living() -> Iterator[Process]:
    """Every process that is not a zombie."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            process = find(int(entry.name))
            if process is not None:
                yield process


def find(pid: int) -> Process | None:
    """The process with this id; None when it has ended, even if its parent has not noticed."""
    fields = _stat(pid)
    if not fields or fields[0] in "ZX":
        return None
    return Process(pid, parent=int(fields[1]), session=int(fields[3]))


def _stat(pid: int) -> list[str]:
    """State, parent, group and session of a process; empty when it is gone."""
    try:
        # The name, in parentheses, may hold spaces and parentheses itself: count from the last.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return []


def _state(pid: int) -> str:
    return (_stat(pid) or [""])[0]


def members(session: int) -> list[Process]:
    """The living processes of a session, orphans included: re-parenting does not leave it."""
    return [process for process in living() if process.session == session]


def sessions_below(pid: int) -> list[int]:
    """Sessions that descendants of ``pid`` opened for themselves."""
    everybody = list(living())
    family, found = {pid}, set[int]()
    while more := {p.pid for p in everybody if p.parent in family} - family:
        family |= more
        found |= {p.session for p in everybody if p.pid in more and p.session in family}
    return sorted(found)


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process."""
    return _state(pid) in ("T", "t")


def marked(mark: bytes) -> list[Process]:
    """The living processes that have ``mark`` (NAME=value) in their environment."""
    return [process for process in living() if mark in _variables(process.pid)]


def _variables(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_session(session: int, *, grace: float) -> int:
    """End whatever is left of a session; returns how many processes had been left."""
    return end_sessions({session}, grace=grace)[0]


def end_sessions(sessions: Set[int], *, grace: float) -> tuple[int, list[int]]:
    """End whatever is left of sessions: SIGTERM, ``grace`` seconds, SIGKILL.

    A process that waits in the kernel (for a dead file server, a broken GPU) survives even that,
    for as long as it waits: it is given up after ``KILLED`` seconds.

    Returns:
        How many processes had been left, and those that could not be ended.
    """
    return _end(lambda process: process.session in sessions, grace)


def end_marked(mark: bytes, *, grace: float, spare: int) -> int:
    """End the processes with ``mark`` in their environment but ``spare``; returns their number."""
    return _end(lambda p: p.pid != spare and mark in _variables(p.pid), grace)[0]


def _end(belongs: Callable[[Process], bool], grace: float) -> tuple[int, list[int]]:
    found = _left(belongs)
    if not found:
        return 0, []
    send(found, signal.SIGTERM)
    held, deadline = found, time.monotonic() + grace
    while (held := _left(belongs, held)) and time.monotonic() < deadline:
        time.sleep(0.1)
    deadline = time.monotonic() + KILLED
    while held and time.monotonic() < deadline:
        send(held, signal.SIGKILL)
        time.sleep(0.05)
        held = _left(belongs, held)
    return len(found), held


def _left(belongs: Callable[[Process], bool], known: Iterable[int] = ()) -> list[int]:
    """Those of ``known`` that are still there; all that there are when they are gone.

    Looking at everybody is left for then: a node has thousands of processes.
    """
    alive = [p.pid for p in map(find, known) if p is not None and belongs(p)]
    return alive or [process.pid for process in living() if belongs(process)]
