"""Ranks meet where they were told and nowhere else, and only those of one run."""

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from l2vit.train import rendezvous
from l2vit.train.rendezvous import UnreachablePeers

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from forked_ranks import Ranks, free_port


def listening() -> set[tuple[str, int]]:
    """Addresses and ports this process listens on, read from the kernel's own tables."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    sockets = {str(link.readlink()) for link in links}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[column] for column in (1, 3, 9))
            if state == "0A" and f"socket:[{inode}]" in sockets:
                address, port = local.split(":")
                found.add((address, int(port, 16)))
    return found


def where_they_listen(world):
    from l2vit.train import watchdog
    from l2vit.train.throughput import PhaseClock

    dog = watchdog.Watchdog(PhaseClock(), world=world, limit=60)
    world.barrier()
    found = listening()
    world.barrier()
    dog.close()
    return found


def test_ranks_of_one_host_listen_on_loopback_alone(tmp_path):
    everything = Ranks(where_they_listen, 2, directory=tmp_path).results()
    loopback = {"0100007F"}  # 127.0.0.1 as the kernel writes it
    assert {address for found in everything for address, _ in found} == loopback
    assert len(everything[0]) >= 2, "the rendezvous and the watchdog"


def meet_as(rank, port, run, token, seconds):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.pop(rendezvous.TOKEN, None)
    if token:
        os.environ[rendezvous.TOKEN] = token
    try:
        store = rendezvous.meet(rank, 2, run=run, seconds=seconds, one_host=True)
    except UnreachablePeers as error:
        print(f"refused: {error}", flush=True)
        return error.exit_status
    store.set(f"said-{rank}", "hello")
    _await(store, f"said-{1 - rank}")
    if rank == 1:
        store.set("heard", "")  # rank 0 keeps the store: it must not leave before
    else:
        _await(store, "heard")
    return 0


def _await(store, key):
    until = time.monotonic() + 60
    while not store.check([key]) and time.monotonic() < until:
        time.sleep(0.01)


def pair(first, second, directory):
    """Two ranks that were told different things; their statuses and what they printed."""
    ranks = [
        Ranks(meet_as, 1, rank, *arguments, directory=directory / str(rank), raw=True)
        for rank, arguments in enumerate((first, second))
    ]
    return [r.wait()[0] for r in ranks], [r.log(0) for r in ranks]


@pytest.mark.parametrize(
    ("first", "second"),
    [(("/r", "t"), ("/r", "t")), (("/r", ""), ("/r", "")), ((1, "t"), (2, "t"))],
)
def test_ranks_of_one_run_meet(first, second, tmp_path):
    port = free_port()
    statuses, said = pair((port, *first, 60), (port, *second, 60), tmp_path)
    assert statuses == [0, 0], said


@pytest.mark.parametrize(
    ("first", "second"), [(("/r", "one"), ("/r", "two")), (("/r", ""), ("/other", ""))]
)
def test_ranks_of_two_runs_do_not(first, second, tmp_path):
    port = free_port()
    statuses, said = pair((port, *first, 8), (port, *second, 60), tmp_path)
    assert statuses == [69, 69]
    assert "rank(s) 1 did not come" in said[0]
    assert f"127.0.0.1:{port}: who answers there is of another run" in said[1]


def test_nobody_there_is_said_after_the_time_given(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(UnreachablePeers, match=r"rank 1 could not meet .* nobody answered"):
        rendezvous.meet(1, 2, run="r", seconds=0.3, one_host=True)


def test_a_socket_opened_for_rank_0_is_used(tmp_path, monkeypatch):
    opened = rendezvous.listen("127.0.0.1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(opened.getsockname()[1]))
    monkeypatch.setenv(rendezvous.STORE_FD, str(os.dup(opened.fileno())))
    store = rendezvous.meet(0, 1, run="r", seconds=10, one_host=True)
    assert store is not None and rendezvous.STORE_FD not in os.environ
    opened.close()


def test_addresses_to_listen_on():
    with contextlib.closing(rendezvous.listen("127.0.0.1")) as found:
        assert found.getsockname()[0] == "127.0.0.1"
    # TEST-NET-1 (RFC 5737) belongs to nobody: the address of a service, say.
    for host in ("", "192.0.2.1"):
        with contextlib.closing(rendezvous.listen(host)) as found:
            assert found.getsockname()[0] == "0.0.0.0"
    with contextlib.closing(rendezvous.listen("127.0.0.1")) as taken, pytest.raises(OSError):
        rendezvous.listen("127.0.0.1", taken.getsockname()[1])
    assert rendezvous.interface_towards("127.0.0.1") == "lo"


def test_an_interface_named_by_the_user_is_kept(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    rendezvous.choose_interface("127.0.0.1", one_host=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7" and os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert socket.gethostbyname("localhost") == "127.0.0.1"
