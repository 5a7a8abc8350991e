"""Reading tar archives one may not trust: nothing is extracted, no link followed, sizes bounded."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_prep.names import escaped
from l2vit.errors import UserError

_BUFFER = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_HEADER_LIMIT = 1 << 20  # a long name or a pax header; a damaged one may ask for terabytes


class Damaged(UserError):
    """An archive's structure is broken."""

    def __init__(self, message: str, lost: int = 0) -> None:
        super().__init__(message)
        self.lost = lost
        """Members behind the damage, as far as their headers can still be found."""


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
    """One entry of an archive. ``problem`` is set where it is not an ordinary file."""

    name: str
    offset: int
    """Of the data, from the start of the archive."""
    size: int
    problem: str = ""


class _HeaderStream:
    """What tarfile sees of a stream. It reads headers only, so it is given small pieces only."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell
        self.last = b""
        """The piece read last: after the walk, the block taken for the end."""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._stream.read(size)
        return self.last


def members(stream: BinaryIO, size: int | None, what: str) -> Iterator[Member]:
    """Walk an uncompressed tar's entries without extracting any; directories are left out.

    The archive must be whole: every member ends inside it, and from its end mark on there is
    nothing but zeros, since tarfile takes any block of zeros for the end.

    Args:
        stream: the archive, at its start. Unless it is damaged it is only sought forwards.
        size: of the archive in bytes; None where only reading to the end can tell.
        what: its name, for messages.

    Raises:
        Damaged: no tar at all, or its structure is broken (names ``what``).
        UserError: it cannot be read.
    """
    if size == 0:
        raise Damaged(f"{what} is empty: download it again")
    headers = _HeaderStream(stream)
    try:
        archive = tarfile.TarFile(
            fileobj=headers,  # type: ignore[arg-type]
            encoding="utf-8",
            errors="surrogateescape",
        )
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has read
            _require_inside(entry, archive.offset, stream, size, what)
            if not entry.isdir():
                yield Member(entry.name, entry.offset_data, entry.size, _problem(entry))
        _require_end(stream, headers.last, archive.offset, what)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {what}: {error.strerror or error}") from error
    except EOFError as error:  # of a compressed stream
        raise Damaged(f"{what} is cut short ({error}): download it again") from error
    except Exception as error:  # tarfile fails in many ways on bytes that are no tar
        text = " ".join(str(error).split())
        if size is not None and _starts_with_gzip(stream):
            text = "gzip-compressed inside another archive: unpack it and pack it plain"
        raise Damaged(f"{what} is damaged or no tar archive ({text})") from error


def _problem(entry: tarfile.TarInfo) -> str:
    if entry.issym() or entry.islnk():
        return "link"
    return "" if entry.isreg() and not entry.issparse() else "not-a-file"


def _starts_with_gzip(stream: BinaryIO) -> bool:
    stream.seek(0)
    return stream.read(2) == b"\x1f\x8b"


def _require_inside(
    entry: tarfile.TarInfo, following: int, stream: BinaryIO, size: int | None, what: str
) -> None:
    name, start = escaped(entry.name), entry.offset_data
    if entry.size < 0 or following < start:
        lost = 1 + _count_members(stream, start)[0]
        raise Damaged(f"{what} is damaged at {name}: its size is negative; {_members(lost)}", lost)
    whole = entry.isreg() and not entry.issparse()
    if whole and size is not None and start + entry.size > size:
        found, _ = _count_members(stream, start)
        if found:
            text = f"damaged at {name}: its size reaches past the end; {_members(1 + found)}"
            raise Damaged(f"{what} is {text}", 1 + found)
        raise Damaged(f"{what} is cut short at {name}: download it again", 1)


def _require_end(stream: BinaryIO, block: bytes, offset: int, what: str) -> None:
    """Check what follows the last member: ``block``, read at ``offset``, and the rest."""
    if len(block) < _BLOCK:
        raise Damaged(f"{what} is cut short: download it again")
    if block.strip(b"\0"):
        found, gaps = _count_members(stream, offset)
        lost = found + gaps
        raise Damaged(f"{what} is damaged: no tar header at byte {offset}; {_members(lost)}", lost)
    place = offset + _BLOCK
    while chunk := stream.read(_BUFFER):
        rest = chunk.lstrip(b"\0")
        if rest:
            place += (len(chunk) - len(rest)) // _BLOCK * _BLOCK
            found, gaps = _count_members(stream, place)
            # A longer hole may have swallowed whole members, header and all.
            unsure = gaps and place - offset > _BLOCK
            text = _members(found + gaps, "at least " if unsure else "")
            raise Damaged(
                f"{what} is damaged: the zeros at byte {offset} are not its end; {text}",
                found + gaps,
            )
        place += len(chunk)


def _members(lost: int, how: str = "") -> str:
    return f"{how}{lost:,} member{'' if lost == 1 else 's'} lost"


def _count_members(stream: BinaryIO, place: int) -> tuple[int, int]:
    """Look for headers from byte ``place`` to the end.

    Returns:
        Files whose headers were found, and stretches of data that no header announces.
    """
    found = gaps = 0
    announced = True
    stream.seek(place)
    while len(block := stream.read(_BLOCK)) == _BLOCK:
        place += _BLOCK
        entry = _header(block)
        if entry is not None:
            found += entry.isreg()
            place += -(-entry.size // _BLOCK) * _BLOCK
            stream.seek(place)
            announced = True
        elif block.strip(b"\0"):
            gaps += announced
            announced = False
    return found, gaps


def _header(block: bytes) -> tarfile.TarInfo | None:
    if not block[148:154].strip(b" \0").isdigit():  # its checksum: most data ends here
        return None
    try:
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None
    return entry if entry.size >= 0 else None


def open_window(path: Path, offset: int = 0, size: int | None = None) -> io.BufferedReader:
    """Buffered reader over part of a file (all of it by default).

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        stream = path.open("rb", buffering=0)
        if size is None:
            size = path.stat().st_size - offset
    except OSError as error:
        raise UserError(f"cannot read {escaped(str(path))}: {error.strerror}") from error
    window = Window(stream, offset, size)  # type: ignore[arg-type]
    return io.BufferedReader(window, _BUFFER)


def is_gzip(path: Path) -> bool:
    """True if the content, not the name, is gzip."""
    try:
        with path.open("rb") as stream:
            return stream.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise UserError(f"cannot read {escaped(str(path))}: {error.strerror}") from error
