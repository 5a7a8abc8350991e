"""Where the ranks of a run meet, and how they know that all of them belong to one run.

Rank 0 keeps a small key-value store that every other rank connects to. It listens on the address
the ranks were told and on no other: on loopback where all of them are on one host. Before any
rank exchanges data, it compares a token with rank 0's, and rank 0 compares every rank's.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import hmac
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from l2vit.errors import UserError

TOKEN = "L2VIT_TOKEN"
"""The run's secret, given by our launchers; a user may set it for others."""
STORE_FD = "L2VIT_STORE_FD"
"""A socket that listens already, opened for rank 0 by the launcher that started it."""
MEETING_SECONDS = 600.0
"""The ranks of a run may start this far apart."""
_SIOCGIFADDR = 0x8915


class UnreachablePeers(UserError):
    """Other ranks could not be reached: starting again later may help (EX_UNAVAILABLE)."""

    exit_status = 69


def meet(
    rank: int, size: int, *, run: str, seconds: float = MEETING_SECONDS, one_host: bool = False
) -> dist.Store:
    """The store all ranks of the run share, after each has proved to be of this run.

    Reads ``MASTER_ADDR`` and ``MASTER_PORT``; under torchrun the store is torchrun's own.

    Args:
        rank: of this process.
        size: number of ranks.
        run: what identifies the run where no launcher gave it a token.
        seconds: how long to wait for the others.
        one_host: all ranks are on this host.

    Raises:
        UnreachablePeers: not all ranks came, or somebody else answers at the address.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"rank {rank} could not meet the others at {host}:{port}"
    until = time.monotonic() + seconds
    choose_interface(host, one_host=one_host)
    try:
        # A host may know its own name by a loopback address: no other host could come in there.
        address = "" if is_loopback(host) and not one_host else host
        store = _connect(rank, size, (host, port), address, seconds)
        _introduce(store, rank, size, _secret(run), until)
    except UnreachablePeers as error:
        raise UnreachablePeers(f"{where}: {error}") from None
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnreachablePeers(f"{where}: {reason}") from error
    return store


def _secret(run: str) -> bytes:
    given = os.environ.get(TOKEN)
    job = os.environ.get("SLURM_JOB_ID", os.environ.get("TORCHELASTIC_RUN_ID", ""))
    return hashlib.sha256((given or f"{run}\0{job}").encode()).digest()


def _connect(rank: int, size: int, at: tuple[str, int], address: str, seconds: float) -> dist.Store:
    host, port = at
    limit = datetime.timedelta(seconds=seconds)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps the store
        return next(iter(dist.rendezvous("env://", rank, size, timeout=limit)))[0]
    if rank == 0:
        inherited = os.environ.pop(STORE_FD, "")
        fd = int(inherited) if inherited else listen(address, port).detach()
        return dist.TCPStore(
            host, port, size, True, limit, wait_for_workers=False, master_listen_fd=fd
        )
    _await_listener(host, port, seconds)
    return dist.TCPStore(host, port, size, False, limit, wait_for_workers=False)


def listen(host: str, port: int = 0) -> socket.socket:
    """A listening socket on ``host``'s address alone, at ``port`` or at any free one.

    An empty host, or one whose address no interface of this machine has (a service's, a
    router's), gives a socket on all interfaces: connections arrive here by other means.
    """
    if not host:
        return _listening(socket.AF_INET, ("", port))
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return _listening(family, address)
    except OSError:
        if not is_foreign(host):
            raise
        return _listening(socket.AF_INET, ("", port))


def _listening(family: int, address: tuple[Any, ...]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
    except OSError:
        made.close()
        raise
    return made


def is_foreign(host: str) -> bool:
    """Whether no interface of this machine has ``host``'s address."""
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind((socket.gethostbyname(host), 0))
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether ``host`` means this machine alone."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False


def _await_listener(host: str, port: int, seconds: float) -> None:
    """Wait until somebody answers, without the pages TCPStore writes while it retries."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UnreachablePeers(f"nobody answered for {seconds:g} s ({error})") from None
        time.sleep(0.2)


def _introduce(store: dist.Store, rank: int, size: int, secret: bytes, until: float) -> None:
    """Compare tokens: each rank rank 0's first, then rank 0 each rank's."""

    def proof(of: int) -> str:
        return hmac.new(secret, f"rank {of} of {size}".encode(), "sha256").hexdigest()

    def shown(of: int) -> str:
        return store.get(f"l2vit/{of}").decode(errors="replace")

    if rank == 0:
        store.set("l2vit/0", proof(0))
        _await(lambda: not _missing(store, size), until, lambda: _told(_missing(store, size)))
        strange = [r for r in range(1, size) if shown(r) != proof(r)]
        if strange:
            raise UnreachablePeers(f"{_ranks(strange)} belong to another run")
        store.set("l2vit/all", "here")
        return
    _await(lambda: store.check(["l2vit/0"]), until, lambda: "who answers is no rank of a run")
    if shown(0) != proof(0):
        raise UnreachablePeers("who answers there is of another run, or has other ranks")
    store.set(f"l2vit/{rank}", proof(rank))
    _await(lambda: store.check(["l2vit/all"]), until, lambda: "other ranks did not come")


def _await(found: Callable[[], bool], until: float, problem: Callable[[], str]) -> None:
    while not found():
        if time.monotonic() > until:
            raise UnreachablePeers(problem())
        time.sleep(0.02)


def _missing(store: dist.Store, size: int) -> list[int]:
    # All at once in the usual case: asking for each of 512 ranks takes as many round trips.
    if store.check([f"l2vit/{r}" for r in range(size)]):
        return []
    return [r for r in range(size) if not store.check([f"l2vit/{r}"])]


def _told(missing: list[int]) -> str:
    return f"{_ranks(missing)} did not come"


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"rank(s) {shown}{f' and {len(numbers) - 8} more' if len(numbers) > 8 else ''}"


# -- interfaces


def choose_interface(host: str, *, one_host: bool) -> None:
    """Let gloo (and NCCL on one host) use the interface that leads to ``host``, unless told.

    Gloo would otherwise take the address of this machine's name, which on many machines is one
    the other hosts cannot reach.
    """
    if one_host and is_loopback(host):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        return
    name = interface_towards(host)
    if name and name != "lo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_towards(host: str) -> str:
    """The network interface packets to ``host`` leave by; empty where that cannot be told."""
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing: it only looks up the route
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""
