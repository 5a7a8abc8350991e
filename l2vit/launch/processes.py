"""The processes of a session, read from /proc: who is a rank, who is left, and ending them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

RANK_MARK = b"LOCAL_RANK="
"""Every launcher gives its ranks this variable, and gives it to nobody else."""
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
    try:
        # The name, in parentheses, may hold spaces and parentheses itself: count from the last.
        state, parent, _group, session = (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
        )
    except OSError:
        return None
    return None if state in "ZX" else Process(pid, int(parent), int(session))


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


def ranks(session: int) -> list[int]:
    """The rank processes of a session, without the loader workers they started."""
    marked = {p.pid: p.parent for p in members(session) if _is_marked(p.pid)}
    return sorted(pid for pid, parent in marked.items() if parent not in marked)


def _is_marked(pid: int) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(variable.startswith(RANK_MARK) for variable in variables)


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_session(session: int, *, grace: float) -> int:
    """End whatever is left of a session: SIGTERM, ``grace`` seconds, SIGKILL.

    A process that waits in the kernel (for a dead file server, a broken GPU) survives even that,
    for as long as it waits: it is given up after ``KILLED`` seconds.

    Returns:
        How many processes had been left.
    """
    left = [process.pid for process in members(session)]
    send(left, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while members(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    deadline = time.monotonic() + KILLED
    while (stubborn := members(session)) and time.monotonic() < deadline:
        send((process.pid for process in stubborn), signal.SIGKILL)
        time.sleep(0.05)
    return len(left)
