"""Reading byte ranges of files in a directory or at an address (``s3://…``, ``https://…``).

Addresses are opened by fsspec. A read is made of pieces: what came is kept, a piece that does not
come is asked for again, and who never answers is named within a minute.
"""

from __future__ import annotations

import errno
import os
import queue
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from l2vit.errors import ConfigError, UserError

STALL_SECONDS = 10.0
"""A piece that has not come by then is asked for again."""
SILENT_SECONDS = 40.0
"""A server that sends nothing for so long is given up."""
TOTAL_SECONDS = 300.0
"""Longest time for one read, however it trickles."""
_PIECE = 8 << 20
_SMALLEST_PIECE = 256 << 10
_PAST_THE_END = ("416", "InvalidRange")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):/+(.+)")


class Source(Protocol):
    """A directory of files, here or elsewhere; picklable."""

    address: str

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``start`` to ``stop`` of the file ``name``; fewer where it ends before.

        Raises:
            OSError: no such file, or an unreadable one.
            UserError: no answer.
        """


def is_remote(where: Path | str) -> bool:
    """Whether ``where`` is an address rather than a path."""
    return _SCHEME.match(str(where)) is not None


def open_source(where: Path | str) -> Source:
    """The files at ``where``: a path or an address."""
    found = _SCHEME.match(str(where))
    if found is None:
        return LocalSource(str(where))
    # a Path has made one slash of two
    return RemoteSource(f"{found[1]}://{found[2].rstrip('/')}")


@dataclass
class LocalSource:
    """A directory."""

    address: str

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See ``Source``."""
        path = Path(self.address) / name
        if stop is None:
            return path.read_bytes()[start:]
        with path.open("rb") as stream:
            return os.pread(stream.fileno(), stop - start, start)


@dataclass
class RemoteSource:
    """A directory at an address fsspec knows."""

    address: str
    _opened: tuple[int, Any, str] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        return {"address": self.address, "_opened": None}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See ``Source``."""
        url = f"{self.address}/{name}"
        received, piece, pause = bytearray(), _PIECE, 0.5
        began = heard = time.monotonic()
        while stop is None or start + len(received) < stop:
            at = start + len(received)
            until = None if stop is None else min(stop, at + piece)
            try:
                data = self._request(name, at, until)
                received += data
                if until is None or not data:  # the file ends here
                    break
                heard, pause = time.monotonic(), 0.5
            except ConfigError:  # no package for this scheme
                raise
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, "No such file", url) from None
            except PermissionError as error:
                raise UserError(f"cannot read {url}: access denied ({error})") from None
            except Exception as error:
                if any(word in str(error) for word in _PAST_THE_END):
                    break
                now = time.monotonic()
                if now - heard > SILENT_SECONDS - STALL_SECONDS or now - began > TOTAL_SECONDS:
                    raise UserError(_unreachable(url, now - heard, error)) from None
                time.sleep(pause)
                piece, pause = max(piece // 2, _SMALLEST_PIECE), min(2 * pause, 8.0)
        return bytes(received)

    def _request(self, name: str, start: int, stop: int | None) -> bytes:
        """One request; what a server sends beyond the range asked for is cut away."""
        filesystem, path = self._filesystem()
        whole = start == 0 and stop is None
        asked = {} if whole else {"start": start, "end": stop}
        limit = STALL_SECONDS if stop is not None else SILENT_SECONDS / 2
        data = _within(limit, filesystem, f"{path}/{name}", asked)
        if stop is not None and len(data) > stop - start:  # the server knows no ranges
            data = data[start:stop]
        return data

    def _filesystem(self) -> tuple[Any, str]:
        import fsspec

        if self._opened is None or self._opened[0] != os.getpid():
            try:
                filesystem, path = fsspec.core.url_to_fs(self.address)
            except (ImportError, ValueError) as error:
                raise ConfigError(f"cannot read {self.address}: {error}") from None
            self._opened = os.getpid(), filesystem, path.rstrip("/")
        return self._opened[1], self._opened[2]


def _unreachable(url: str, seconds: float, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {reason[0]}" if reason else type(error).__name__
    return f"cannot read {url}: nothing came for {seconds:.0f} seconds ({what})"


def _within(seconds: float, filesystem: Any, path: str, asked: dict[str, Any]) -> bytes:
    """``filesystem.cat_file``, given up after ``seconds``."""
    if getattr(filesystem, "async_impl", False):
        from fsspec.asyn import sync

        found = sync(filesystem.loop, filesystem._cat_file, path, timeout=seconds, **asked)
        return bytes(found)
    results: queue.Queue[bytes | Exception] = queue.Queue()

    def run() -> None:
        try:
            results.put(filesystem.cat_file(path, **asked))
        except Exception as error:
            results.put(error)

    threading.Thread(target=run, name="read", daemon=True).start()
    try:
        found = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer for {seconds:.0f} seconds") from None
    if isinstance(found, Exception):
        raise found
    return bytes(found)
