"""What happened to a run besides its curves: each start, end and export, a line of JSON each.

``history.jsonl`` in the run directory is only ever appended to: unlike the curves it keeps what an
interrupted process did after its last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

NAME = "history.jsonl"


def append(run: Path, event: str, **values: Any) -> None:
    """Add one event; a disk that refuses it does not stop the run."""
    line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
    with contextlib.suppress(OSError), (run / NAME).open("ab+") as stream:
        if stream.tell() and _last_byte(stream.fileno(), stream.tell()) != b"\n":
            line = f"\n{line}"  # a kill cut the last line short
        stream.write(f"{line}\n".encode())
        stream.flush()
        os.fsync(stream.fileno())


def _last_byte(descriptor: int, size: int) -> bytes:
    return os.pread(descriptor, 1, size - 1)


def read(run: Path) -> list[dict[str, Any]]:
    """The events in the order they happened; damaged lines are left out."""
    try:
        lines = (run / NAME).read_bytes().splitlines()
    except OSError:
        return []
    found = (_event(line) for line in lines)
    return [event for event in found if event is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    return event if type(event.get("time")) in (int, float) else None
