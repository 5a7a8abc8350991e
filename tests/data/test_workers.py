"""Worker processes that die at the worst moments: the run hears of it and never waits for them."""

import fcntl
import gc
import itertools
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.synchronize import SemLock
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from l2vit.data import workers
from l2vit.errors import UserError


@pytest.mark.parametrize(
    ("error", "dead", "lost"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), False, True),
        (ConnectionResetError(104, "Connection reset by peer"), True, True),
        (RuntimeError("received 0 items of ancillary data"), True, True),
        (EOFError(), True, True),
        (OSError(28, "No space left on device"), False, False),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTrace"), True, False),
    ],
)
def test_a_lost_worker_is_told_from_an_error_in_it(error, dead, lost, monkeypatch):
    monkeypatch.setattr(workers, "_DEATH_SECONDS", 0.1)
    sentinel, held = multiprocessing.Pipe(duplex=False)
    if dead:
        held.close()

    class Items:
        _workers = (SimpleNamespace(sentinel=sentinel),)

        def __iter__(self):
            return self

        def __next__(self):
            raise error

    with pytest.raises(UserError if lost else type(error)) as raised:
        list(workers._raising_errors(Items(), multiprocessing.Pipe()[1]))
    assert not lost or "was killed" in str(raised.value)


@dataclass
class HoldingLocks(torch.utils.data.Dataset):
    """Whose worker dies at item 5 with every lock that it shares with other processes in hand."""

    def __getitem__(self, number):
        if number == 5:
            for lock in gc.get_objects():
                if isinstance(lock, SemLock):
                    lock.acquire(timeout=0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return number


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_may_die_with_all_locks_held(count):
    batches = workers.WorkerBatches(HoldingLocks(), workers=count, prefetch=2, pin=False)
    with pytest.raises(UserError, match=r"was killed \(.*data.threads"):
        list(batches)
    assert not multiprocessing.active_children()


@dataclass
class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, number):
        return number


def test_only_the_pipe_of_finished_batches_is_large():
    """Past 64 MiB of large pipes Linux gives a user without privileges 8 KiB for each new one."""

    def size(queue):
        return fcntl.fcntl(queue._writer.fileno(), fcntl.F_GETPIPE_SZ)

    batches = iter(workers.WorkerBatches(Numbers(), workers=2, prefetch=2, pin=False))
    assert next(batches) == 0
    items = batches.gi_frame.f_locals["items"]
    usual = multiprocessing.SimpleQueue()
    assert size(items._worker_result_queue) == workers._PIPE_BYTES > size(usual)
    assert [size(queue) for queue in items._index_queues] == [size(usual)] * 2
    batches.close()


@dataclass
class Large(torch.utils.data.Dataset):
    """Messages of 16 KiB, twice what a batch of 128 takes; two workers never make their 16th."""

    pids: Path

    def __getitem__(self, number):
        if number < 30:
            return bytes(16 * 1024)
        written = self.pids / f"{number}.part"
        written.write_text(str(os.getpid()))
        written.rename(self.pids / f"{number}.pid")
        time.sleep(3600)


def test_workers_may_die_with_many_batches_on_the_way(tmp_path):
    """More than a pipe of the usual size holds: none may be left half written."""
    batches = iter(workers.WorkerBatches(Large(tmp_path), workers=2, prefetch=16, pin=False))
    next(batches)
    made = multiprocessing.active_children()
    while len(pids := list(tmp_path.glob("*.pid"))) < 2:
        assert all(worker.is_alive() for worker in made)
        time.sleep(0.01)
    for pid in pids:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    with pytest.raises(UserError, match="was killed"):
        list(itertools.islice(batches, 30))
