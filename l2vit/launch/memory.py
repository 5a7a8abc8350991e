"""Whether a killed process was killed for want of memory: the kernel's counters and its log."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_KMSG = Path("/dev/kmsg")
_CGROUPS = Path("/sys/fs/cgroup")


class Kills:
    """Remembers how often memory ran out when it was made, to see whether it did since."""

    def __init__(self) -> None:
        self._before = _count()

    def explain(self, pid: int) -> str:
        """What is known about a process that SIGKILL ended."""
        now = _count()
        if _logged(pid):
            return "out of memory, says the kernel's log; lower data.threads or data.prefetch"
        if self._before is not None and now is not None and now > self._before:
            return (
                "out of memory: the limit of this control group was reached"
                " (memory.events); raise it, or lower data.threads or data.prefetch"
            )
        return (
            "probably out of memory (dmesg tells), unless somebody ended it;"
            " lower data.threads or data.prefetch"
        )


def _count() -> int | None:
    """How many processes of this control group memory's end has killed so far."""
    for path in _counters():
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, number = line.partition(" ")
                if name == "oom_kill":
                    return int(number)
    return None


def _counters() -> list[Path]:
    found = [_CGROUPS / "memory.events", _CGROUPS / "memory" / "memory.oom_control"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                found.insert(0, _CGROUPS / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                found.insert(0, _CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control")
    return found


def _logged(pid: int) -> bool:
    """Whether the kernel's log, where we may read it, names the process as killed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(_KMSG, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return _in_log(descriptor, f"Killed process {pid} ".encode())
        finally:
            os.close(descriptor)
    return False


def _in_log(descriptor: int, wanted: bytes) -> bool:
    while True:
        try:
            record = os.read(descriptor, 8192)
        except BrokenPipeError:  # overwritten while we read: go on with the next
            continue
        except OSError:  # no more for now
            return False
        if not record or wanted in record:
            return bool(record)
