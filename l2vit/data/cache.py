"""A cache of byte ranges on a local disk, bounded in size and shared by the ranks of a node.

Every range is a file, complete once it has its name. Who lacks one fetches it under a lock, so
that a range is fetched once however many processes need it. Where the limit would be passed the
least recently used ranges go first. A process that is killed leaves at most an unfinished file,
which a later eviction removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from l2vit.errors import UserError

_LOCKS = 512
_SIZE = "size"
"""The file that counts the bytes held, and its lock."""
_UNFINISHED = ".part-"
_ABANDONED_SECONDS = 3600.0
EVICT_TO = 0.9
"""Share of the limit that an eviction leaves, so that it is not needed at every range."""


class RangeCache:
    """Byte ranges by name in ``root``; at most ``limit`` bytes. Picklable; threads may share it.

    Raises:
        UserError: ``root`` cannot be written.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        try:
            (root / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: cannot write to {root}: {error.strerror}") from None

    def read(
        self,
        name: str,
        fetch: Callable[[], bytes],
        start: int = 0,
        size: int | None = None,
        *,
        last: bool = False,
        sync: bool = True,
    ) -> bytes:
        """Bytes of the range ``name``, which is fetched if it is not there.

        Args:
            name: of the range.
            fetch: gets the whole of it.
            start: first byte wanted.
            size: bytes wanted; None for all from there on.
            last: it is not needed again soon, and may be evicted before all others.
            sync: write it to the disk before it has its name. Needless where whoever reads it
                would see what a power cut leaves.
        """
        with contextlib.suppress(FileNotFoundError):
            return self._read(name, start, size, last=last)
        with self._lock(name):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                return self._read(name, start, size, last=last)
            content = fetch()
            self._store(name, content, sync=sync)
        return content[start:] if size is None else content[start : start + size]

    def add_missing(
        self,
        names: Sequence[str],
        fetch: Callable[[list[str]], Iterator[tuple[str, bytes]]],
        *,
        sync: bool = True,
    ) -> None:
        """Fetch together those of ``names`` that are neither there nor being fetched elsewhere."""
        with contextlib.ExitStack() as locks:
            missing = []
            for name in names:
                if (self.root / name).exists():
                    continue
                mine = locks.enter_context(self._lock(name, wait=False))
                if mine and not (self.root / name).exists():
                    missing.append(name)
            if missing:
                for name, content in fetch(missing):
                    self._store(name, content, sync=sync)

    def drop(self, name: str) -> None:
        """Forget a range that turned out damaged."""
        (self.root / name).unlink(missing_ok=True)

    def _read(self, name: str, start: int, size: int | None, *, last: bool) -> bytes:
        descriptor = os.open(self.root / name, os.O_RDONLY)
        try:
            os.utime(descriptor, (0, 0) if last else None)  # the time of last use
            if size is None:
                size = os.fstat(descriptor).st_size - start
            return os.pread(descriptor, size, start)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of ``name``; False if another holds it and nobody is to ``wait``."""
        file = name if name == _SIZE else f"{zlib.crc32(name.encode()) % _LOCKS:03d}"
        descriptor = os.open(self.root / "locks" / file, os.O_RDWR | os.O_CREAT, 0o666)
        mine = True
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                mine = False
            yield mine
        finally:
            os.close(descriptor)

    def _store(self, name: str, content: bytes, *, sync: bool) -> None:
        """Make room for ``content`` and write it; one process at a time, so the limit holds."""
        with self._lock(_SIZE):
            held = self._held()
            if held + len(content) > self.limit:
                held = self._evict(int(EVICT_TO * self.limit) - len(content))
            try:
                self._write(name, content, sync=sync)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                held = self._evict(held // 2)  # others fill this disk: make do with less
                self._write_or_tell(name, content)
            (self.root / _SIZE).write_text(str(held + len(content)))

    def _write_or_tell(self, name: str, content: bytes) -> None:
        try:
            self._write(name, content, sync=True)
        except OSError:
            raise UserError(
                f"data.cache_dir: no space left for {len(content):,} bytes in {self.root};"
                " lower data.cache_gib or make room"
            ) from None

    def _write(self, name: str, content: bytes, *, sync: bool) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}{_UNFINISHED}{os.getpid()}-{threading.get_ident()}")
        try:
            with part.open("wb") as stream:
                stream.write(content)
                stream.flush()
                if sync:  # else a power cut may leave an empty file of that name
                    os.fsync(stream.fileno())
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)

    def _held(self) -> int:
        try:
            return int((self.root / _SIZE).read_text())
        except (OSError, ValueError):
            return sum(size for _, size, _ in self._ranges())

    def _evict(self, most: int) -> int:
        """Remove the least recently used ranges until ``most`` bytes are left; how many are."""
        ranges = sorted(self._ranges())
        held = sum(size for _, size, _ in ranges)
        for _, size, path in ranges:
            if held <= most:
                break
            path.unlink(missing_ok=True)
            held -= size
        return held

    def _ranges(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of each range; removes what killed processes left."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder) / name
                if path.parent in (self.root, self.root / "locks"):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    if _UNFINISHED not in name:
                        yield found.st_mtime_ns, found.st_size, path
                    elif time.time() - found.st_mtime > _ABANDONED_SECONDS:
                        path.unlink()
