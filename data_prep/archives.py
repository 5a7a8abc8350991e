"""Reading tar archives one may not trust: nothing is extracted, no link followed, sizes bounded."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from l2vit.errors import UserError

_BUFFER = 1 << 20


class Damaged(UserError):
    """An archive's structure is broken."""


class Window(io.RawIOBase):
    """Read-only view of ``size`` bytes of a file from ``offset``: a tar inside a tar."""

    def __init__(self, stream: BinaryIO, offset: int, size: int) -> None:
        self._stream, self._offset, self._size, self._place = stream, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(0, self._size - self._place))
        self._stream.seek(self._offset + self._place)
        data = self._stream.read(wanted)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


@dataclass(frozen=True)
class Member:
    """One entry of an archive. ``problem`` is set where it is not an ordinary whole file."""

    name: str
    offset: int
    """Of the data, from the start of the archive."""
    size: int
    problem: str = ""


def members(stream: BinaryIO, size: int, what: str) -> Iterator[Member]:
    """Walk an uncompressed tar's entries without extracting any; directories are left out.

    Raises:
        Damaged: no tar at all, or its structure is broken (names ``what``).
        UserError: it cannot be read.
    """
    if size == 0:
        raise Damaged(f"{what} is empty: download it again")
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has read
                if not entry.isdir():
                    yield _member(entry, size)
            _require_end(stream, archive.offset, what)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise Damaged(f"{what} is damaged or no tar archive ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {what}: {error.strerror or error}") from error


def _require_end(stream: BinaryIO, offset: int, what: str) -> None:
    """tarfile takes a broken or missing header for the end; only a block of zeros is one."""
    stream.seek(offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise Damaged(f"{what} is cut short: download it again")
    if any(block):
        raise Damaged(f"{what} is damaged: no tar header at byte {offset}")


def _member(entry: tarfile.TarInfo, size: int) -> Member:
    problem = ""
    if entry.issym() or entry.islnk():
        problem = "link"
    elif not entry.isreg() or entry.issparse():
        problem = "not-a-file"
    elif entry.offset_data + entry.size > size:
        problem = "cut-short"
    return Member(entry.name, entry.offset_data, entry.size, problem)


def open_window(path: Path, offset: int = 0, size: int | None = None) -> io.BufferedReader:
    """Buffered reader over part of a file (all of it by default).

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        stream = path.open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if size is None:
        size = path.stat().st_size - offset
    window = Window(stream, offset, size)  # type: ignore[arg-type]
    return io.BufferedReader(window, _BUFFER)


def is_gzip(path: Path) -> bool:
    """Whether the content, not the name, says gzip."""
    try:
        with path.open("rb") as stream:
            return stream.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
