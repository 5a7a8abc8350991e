"""The kinds of events of ``chaos.py``: each does its harm and says in a few words what it did."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from chaos_hosts import Run

from l2vit.launch import processes
from l2vit.train.checkpoint import META_NAME

SHORT_STOP, SHORT_CUT, LONG_CUT = 1.0, 1.0, 12.0
"""Seconds; the run gives up a rank that stands still, and a peer it cannot reach, after 8."""


def kill_rank(run: Run, draw: random.Random) -> str:
    """One rank gets SIGKILL; its supervisor starts all again."""
    pid = draw.choice(run.all_ranks() or [0])
    processes.send([pid] if pid else [], signal.SIGKILL)
    return "SIGKILL to one rank"


def kill_host(run: Run, draw: random.Random) -> str:
    """Everything on one host dies."""
    host = draw.randrange(len(run.hosts))
    run.kill_host(host)
    return f"everything on host {host}"


def kill_all(run: Run, draw: random.Random) -> str:
    """Everything dies everywhere."""
    run.kill_all()
    return "everything on every host"


def kill_supervisor(run: Run, draw: random.Random) -> str:
    """A supervisor dies alone; its ranks notice, save and end."""
    host = draw.randrange(len(run.hosts))
    run.signal_supervisor(host, signal.SIGKILL)
    return f"SIGKILL to the supervisor of host {host}"


def stop_politely(run: Run, draw: random.Random) -> str:
    """SIGTERM to a supervisor; the ranks save and leave."""
    host = draw.randrange(len(run.hosts))
    run.signal_supervisor(host, signal.SIGTERM)
    return f"SIGTERM to the supervisor of host {host}"


def stand_still(run: Run, draw: random.Random) -> str:
    """A rank is stopped for a moment and goes on."""
    pids = run.all_ranks()
    pid = [draw.choice(pids)] if pids else []
    processes.send(pid, signal.SIGSTOP)
    time.sleep(SHORT_STOP)
    processes.send(pid, signal.SIGCONT)
    return f"SIGSTOP to one rank, SIGCONT after {SHORT_STOP:g} s"


def stop_for_good(run: Run, draw: random.Random) -> str:
    """A rank is stopped and stays so."""
    pids = run.all_ranks()
    processes.send([draw.choice(pids)] if pids else [], signal.SIGSTOP)
    return "SIGSTOP to one rank"


def fill_disk(run: Run, draw: random.Random) -> str:
    """No byte more can be written until a checkpoint has failed."""
    mark = run.mark()
    if run.mounted:
        filler = run.disk / "filler"
        with filler.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(1 << 16))
            except OSError:
                pass
        noticed = run.await_word("not saved", mark)
        filler.unlink()
        how = "no space left"
    else:
        limited = run.all_ranks()
        _limit(limited, 4096)
        noticed = run.await_word("not saved", mark)
        _limit(limited, resource.RLIM_INFINITY)
        how = "file size limit"
    return f"{how}; {'a save failed and was told' if noticed else 'no save came'}"


def _limit(pids: list[int], size: int) -> None:
    for pid in pids:
        if processes.find(pid) is not None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _damaged(run: Run, draw: random.Random, harm: Callable[[Path], str], *, index: bool) -> str:
    """Everything dies; a file of the newest checkpoint is harmed before it starts again."""
    run.kill_all()
    if run.reached().saved == 0:
        return "no checkpoint yet"
    files = sorted(run.newest().glob("part-*"))
    path = run.newest() / META_NAME if index else draw.choice(files)
    return f"{harm(path)} {path.parent.name}/{path.name}"


def tear_part(run: Run, draw: random.Random) -> str:
    """The end of a part is missing."""

    def harm(path: Path) -> str:
        with path.open("r+b") as stream:
            stream.truncate(draw.randrange(path.stat().st_size))
        return "cut short:"

    return _damaged(run, draw, harm, index=False)


def _flip(path: Path, draw: random.Random) -> str:
    with path.open("r+b") as stream:
        place = draw.randrange(path.stat().st_size)
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << draw.randrange(8)]))
    return "one bit flipped:"


def flip_part(run: Run, draw: random.Random) -> str:
    """A bit of a part is another."""
    return _damaged(run, draw, lambda path: _flip(path, draw), index=False)


def flip_index(run: Run, draw: random.Random) -> str:
    """A bit of ``checkpoint.json`` is another."""
    return _damaged(run, draw, lambda path: _flip(path, draw), index=True)


def lose_part(run: Run, draw: random.Random) -> str:
    """A part is gone."""

    def harm(path: Path) -> str:
        path.unlink()
        return "deleted:"

    return _damaged(run, draw, harm, index=False)


def lose_index(run: Run, draw: random.Random) -> str:
    """``checkpoint.json`` is gone, as if the save had been killed before its end."""

    def harm(path: Path) -> str:
        path.unlink()
        return "deleted:"

    return _damaged(run, draw, harm, index=True)


def lose_shard(run: Run, draw: random.Random) -> str:
    """A shard of the training data is away while the run starts, then back."""
    run.kill_all()
    mark = run.mark()
    shard = draw.choice(sorted((run.shards / "train").glob("shard-*.tar")))
    aside = run.shards / shard.name
    shutil.move(shard, aside)
    named = run.await_word(shard.name, mark)
    shutil.move(aside, shard)
    return f"{shard.name} away until {'a start had named it' if named else 'nobody missed it'}"


def cut_link(run: Run, draw: random.Random) -> str:
    """The wire between two hosts is cut long enough that the ranks give each other up."""
    return _cut(run, LONG_CUT)


def cut_link_shortly(run: Run, draw: random.Random) -> str:
    """The wire between two hosts is cut for a moment."""
    return _cut(run, SHORT_CUT)


def _cut(run: Run, seconds: float) -> str:
    assert run.wire is not None
    run.wire.wire("down")
    try:
        time.sleep(seconds)
    finally:
        run.wire.wire("up")
    return f"wire cut for {seconds:g} s"


KINDS: dict[str, Callable[[Run, random.Random], str]] = {
    "rank killed": kill_rank,
    "host killed": kill_host,
    "all killed": kill_all,
    "supervisor killed": kill_supervisor,
    "SIGTERM": stop_politely,
    "rank stopped": stop_for_good,
    "rank paused": stand_still,
    "disk full": fill_disk,
    "part torn": tear_part,
    "part flipped": flip_part,
    "index flipped": flip_index,
    "part lost": lose_part,
    "index lost": lose_index,
    "shard lost": lose_shard,
    "link cut": cut_link,
    "link cut shortly": cut_link_shortly,
}
NEED_TWO_HOSTS = ("link cut", "link cut shortly")
END_THE_RUN = tuple(KINDS.keys() - {"rank paused", "disk full", "link cut", "link cut shortly"})
"""A start after these is part of them. A cut wire may be back before anybody gave up."""
