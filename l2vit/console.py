"""Printing what people may read, without ever stopping for want of a reader."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TextIO


def tell(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Print at once; what nobody can take (terminal closed, disk full) is dropped.

    For processes that must go on, or end in their own way, whatever became of their output.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as problem:
        if problem.errno != errno.ENOSPC:  # room may be made; no reader comes back
            mute(stream)


def mute(stream: TextIO) -> None:
    """Let what is printed, and what was not flushed yet, go nowhere."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def flush() -> None:
    """Flush, so that the interpreter's own try at its end cannot change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            mute(stream)
