"""Runs a command, then ends whatever it left behind: python and_all_it_started.py COMMAND ...

A process that outlives the tests keeps their output open, and CI would wait for it for ever.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE = 30.0
"""Seconds; the kernel may hold a process longer."""


def descendants() -> dict[int, str]:
    """Names of the living processes below this one, by id."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            start, _, rest = path.read_text().rpartition(")")
            state, parent = rest.split()[:2]
            parents[int(path.parent.name)] = int(parent)
            if state not in "ZX":
                names[int(path.parent.name)] = start.partition("(")[2]
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return {pid: name for pid, name in names.items() if pid in family - {os.getpid()}}


def main(command: list[str]) -> int:
    """The command's exit status, as a shell gives it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans become ours
    process = subprocess.Popen(command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the command, too
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = _wait_for(process.pid)
    if left := descendants():
        print(f"left behind and ended: {left}", file=sys.stderr)
    deadline = time.monotonic() + _PATIENCE
    while (left := descendants()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return status if status >= 0 else 128 - status


def _wait_for(wanted: int) -> int:
    """Its exit status; buries orphans meanwhile, whose end a test may be waiting for."""
    while True:
        pid, status = os.wait()
        if pid == wanted:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
