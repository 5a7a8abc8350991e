"""What the supervisor and its agents on other nodes say to each other through ssh's pipes.

A frame is a letter, a length and so many bytes: ``J`` a JSON object, ``1`` and ``2`` what a rank
wrote to its output and to its errors.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from typing import IO, Any

GREETING = b"\n\0l2vit agent 1\n"
"""Comes before the first frame; what a login script prints before it is not ours."""
JSON, OUTPUT, ERRORS = b"J", b"1", b"2"
BEAT_SECONDS = 2.0
_HEAD = struct.Struct(">cI")
_LONGEST = 64 << 20
_WAITING = 4 << 20
"""Bytes of ranks' output that may wait for a slow line; older output is dropped beyond."""


def frame(kind: bytes, payload: bytes) -> bytes:
    """One frame as bytes."""
    return _HEAD.pack(kind, len(payload)) + payload


def frames(stream: IO[bytes], *, greeted: bool = True) -> Iterator[tuple[bytes, bytes]]:
    """The frames that come in until the other side ends or says something else.

    Args:
        stream: read to its end.
        greeted: false: skip what comes before the greeting.
    """
    if not greeted and not _skip_to_greeting(stream):
        return
    while True:
        head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return
        kind, size = _HEAD.unpack(head)
        if kind not in (JSON, OUTPUT, ERRORS) or size > _LONGEST:
            return
        payload = stream.read(size)
        if len(payload) < size:
            return
        yield kind, payload


def _skip_to_greeting(stream: IO[bytes]) -> bool:
    seen = b""
    while not seen.endswith(GREETING):
        byte = stream.read(1)
        if not byte or len(seen) > 1 << 20:
            return False
        seen += byte
    return True


class Outbox:
    """Sends frames from a thread of its own, so that a line that stalls stops nobody.

    What was said (JSON) is kept until it is sent; ranks' output is dropped when too much waits.
    """

    def __init__(self, descriptor: int, *, greet: bool = False) -> None:
        self._descriptor = descriptor
        self._queue: collections.deque[bytes] = collections.deque([GREETING] if greet else [])
        self._waiting = 0
        self._ready = threading.Condition()
        self._closed = self.broken = False
        self._thread = threading.Thread(target=self._send, name="outbox", daemon=True)
        self._thread.start()

    def say(self, **message: Any) -> None:
        """Send a JSON object."""
        self._put(frame(JSON, json.dumps(message).encode()), 0)

    def output(self, kind: bytes, data: bytes) -> None:
        """Send what a rank wrote, unless too much of that waits already."""
        if self._waiting < _WAITING:
            self._put(frame(kind, data), len(data))

    def _put(self, data: bytes, counted: int) -> None:
        with self._ready:
            self._queue.append(data)
            self._waiting += counted
            self._ready.notify()

    def _send(self) -> None:
        while True:
            with self._ready:
                while not self._queue and not self._closed:
                    self._ready.wait()
                if not self._queue:
                    return
                data = b"".join(self._queue)
                self._queue.clear()
                self._waiting = 0
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                self.broken = True
                return

    def close(self, seconds: float) -> None:
        """Give what waits so long to be sent, then close the line."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join(seconds)
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
