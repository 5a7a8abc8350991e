"""The lock on a run directory: two starts at once must not train over each other.

Rank 0 holds it as a file ``LOCK``, which a hard link creates: that succeeds for one process alone,
on NFS too, where ``flock`` is not kept. A thread advances a counter in the file, so that other
hosts see that the holder lives. The thread's writes go to the file it created, never to one that
has taken its place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from l2vit import cli
from l2vit.errors import ConfigError, UserError

if TYPE_CHECKING:  # the launcher's agents use this without torch
    from l2vit.train.distributed import World

NAME = "LOCK"
RUN_ID = "L2VIT_RUN_ID"
"""Given by the supervisor to every start of one run: a restart takes the lock of the one before."""
BEAT = 5.0
"""Seconds between two advances of the counter."""
STALE = 60.0
"""Seconds of our own clock after which a counter that stands still proves the holder dead."""
SETTLE = 1.0
"""Seconds after which a lock taken over, or found missing, is looked at again."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: a process on a host that has been up since a certain boot."""

    host: str
    boot_id: str
    pid_namespace: str
    """A container's processes are numbered for themselves."""
    pid: int
    started: int
    """The process's start, in clock ticks after the boot: numbers of processes are used again."""
    since: float
    token: str
    """Common to all starts of one supervised run."""
    counter: int = 0

    @classmethod
    def myself(cls) -> Holder:
        """This process, from now on."""
        return cls(
            host=socket.gethostname(),
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            started=_start_time(os.getpid()) or 0,
            since=round(time.time(), 3),
            token=os.environ.get(RUN_ID) or secrets.token_hex(8),
        )

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """The holder that the file names; None where it is gone or names none.

        Raises:
            OSError: it cannot be read, which says nothing about the holder.
        """
        try:
            found = cls(**json.loads(path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        wanted = {name: type(value) for name, value in asdict(_NOBODY).items()}
        return found if all(type(getattr(found, n)) is t for n, t in wanted.items()) else None

    def to_bytes(self) -> bytes:
        """As JSON, of one length whatever the counter, so that it can be written in place."""
        *fixed, (_, counter) = asdict(self).items()
        return f'{json.dumps(dict(fixed))[:-1]}, "counter": {counter:>12}}}\n'.encode()

    def is_same(self, other: Holder | None) -> bool:
        """True if ``other`` is this very process, whatever the counters say."""
        return other is not None and replace(other, counter=self.counter) == self

    @property
    def alive_here(self) -> bool | None:
        """Whether the process lives on this host; None if it belongs to another host."""
        if not self.boot_id or self.boot_id != _boot_id():
            return None
        if self.pid_namespace != _pid_namespace():
            return None
        return _start_time(self.pid) == self.started

    def __str__(self) -> str:
        if self is _NOBODY:
            return "another process"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {since}"


_NOBODY = Holder("", "", "", 0, 0, 0.0, "")


def _boot_id() -> str:
    """Differs between hosts, and from one boot to the next; empty where the kernel tells none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pid_namespace() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _start_time(pid: int) -> int | None:
    """When the process started, in clock ticks after the boot; None once it has ended."""
    try:
        # The name, in parentheses, may hold spaces and parentheses itself: count from the last.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class RunLock:
    """The lock of one process on one run directory. ``lost`` says why once it is no longer ours."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        me: Holder | None = None,
    ) -> None:
        self.path = directory / NAME
        self.lost = ""
        self._clock, self._sleep = clock, sleep
        self._me = me or Holder.myself()
        self._file: int | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock; waits only to see whether a holder on another host still lives.

        Raises:
            ConfigError: somebody holds it; says who and since when.
            OSError: the directory cannot be written.
        """
        own = self.path.with_name(f"{NAME}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            self._file = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._write()
            self._take(own)
        except BaseException:
            self._close()
            raise
        finally:
            own.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()

    def refuse_if_alive_here(self) -> None:
        """Raise if another process of this host holds the lock."""
        holder = Holder.read(self.path)
        if holder is not None and holder.alive_here and holder.token != self._me.token:
            self._refuse(holder)

    def release(self) -> None:
        """Delete the lock, if it is still ours."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2 * SETTLE)  # an unreachable file server may hold it: leave it then
            self._thread = None
        if self._file is not None and not self.lost:
            with contextlib.suppress(OSError):
                if self._is_ours():
                    self.path.unlink()
        self._close()

    def beat(self) -> None:
        """Advance the counter; notice when the lock has been deleted or taken over."""
        if not self._is_ours():
            self._sleep(SETTLE)  # a file server may answer late, or with what it knew before
            if not self._is_ours():
                self.lost = self._why_lost()
                return
        self._me = replace(self._me, counter=self._me.counter + 1)
        self._write()

    # -- taking

    def _take(self, own: Path) -> None:
        while not self._link(own):
            holder = self._wait_for_stale()
            if holder is None:
                continue  # released meanwhile
            own.replace(self.path)
            self._sleep(SETTLE)  # another start may have judged the same lock stale: the last stays
            if self._is_ours():
                return
            self._refuse(Holder.read(self.path))

    def _link(self, own: Path) -> bool:
        """Make ``own`` the lock unless there is one."""
        try:
            os.link(own, self.path)
        except FileExistsError:
            return own.stat().st_nlink == 2  # NFS may repeat a request that had succeeded
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create()
        return True

    def _create(self) -> bool:
        """Where the file system has no hard links: create the lock itself."""
        try:
            created = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        self._close()
        self._file = created
        self._write()
        return True

    def _wait_for_stale(self) -> Holder | None:
        """The holder of a stale lock, once it proves to be one; None if the lock is gone.

        Raises:
            ConfigError: its holder lives.
        """
        seen, since, told = self._content(), self._clock(), False
        while (content := self._content()) is not None:
            holder = Holder.read(self.path) or _NOBODY
            if holder.token == self._me.token or holder.alive_here is False:
                return holder
            if holder.alive_here or (content != seen and holder is not _NOBODY):
                self._refuse(holder)
            if content != seen:
                seen, since = content, self._clock()
            if self._clock() - since >= STALE:
                return holder
            if not told:
                told = True
                cli.tell(f"{self.path} is held by {holder}; up to {STALE:g} s to see if it lives")
            self._sleep(1.0)
        return None

    def _refuse(self, holder: Holder | None) -> NoReturn:
        raise ConfigError(
            f"run.dir: {self.path.parent} is in use by {holder or _NOBODY}; let it end, stop it,"
            " or use another run.dir",
            key="run.dir",
        )

    # -- keeping

    def _keep(self) -> None:
        while not self.lost and not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # no proof that it is lost: try again
                self.beat()

    def _is_ours(self) -> bool:
        return self._me.is_same(Holder.read(self.path))

    def _why_lost(self) -> str:
        holder = Holder.read(self.path)
        by = f"taken over by {holder}" if holder is not None else "deleted"
        return f"{self.path} was {by}: ending without saving, as another start may train there now"

    def _write(self) -> None:
        assert self._file is not None
        os.pwrite(self._file, self._me.to_bytes(), 0)
        os.fsync(self._file)

    def _content(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def hold(directory: Path, world: World) -> RunLock:
    """Rank 0 takes the lock before anything is written; without it no rank goes on.

    Raises:
        ConfigError: somebody holds it.
        UserError: the directory cannot be written.
    """
    lock = RunLock(directory)
    problem: UserError | None = None
    if world.main:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            problem = UserError(f"run.dir: cannot write to {directory}: {error.strerror}")
        except UserError as error:
            problem = error
    world.raise_on_all_ranks(problem)
    return lock


def refuse_if_held(directory: Path) -> None:
    """Refuse a run directory that a process of this host is training in; takes nothing.

    Raises:
        ConfigError: says who and since when.
    """
    lock = RunLock(directory)
    with contextlib.suppress(OSError):
        lock.refuse_if_alive_here()
