"""The lock on a run directory, between real processes; another host is a file that names one."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from l2vit.errors import ConfigError
from l2vit.launch import command, supervisor
from l2vit.train import run_lock
from l2vit.train.run_lock import Holder, RunLock

HOLD = """
import sys, time
from pathlib import Path
from l2vit.errors import UserError
from l2vit.train.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
sys.stdin.readline()
try:
    lock.acquire()
    print("held", flush=True)
except UserError as error:
    print(error, flush=True)
sys.stdin.readline()
lock.release()
"""


class Process:
    """Takes the lock when told to, and lets it go when told to."""

    def __init__(self, run, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def go(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def said(self):
        return self.process.stdout.readline().strip()

    def acquire(self):
        self.go()
        return self.said()

    def end(self):
        self.go()
        assert self.process.wait() == 0


@pytest.fixture
def processes(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(run=tmp_path, **environment):
            made = Process(run, **environment)
            stack.enter_context(made.process)
            stack.callback(made.process.kill)
            return made

        yield start


class Clock:
    """Time that passes only while somebody sleeps; ``each`` is called every time."""

    def __init__(self, each=lambda: None):
        self.now, self.each = 0.0, each

    def sleep(self, seconds):
        self.now += seconds
        self.each()

    def lock(self, run, **options):
        return RunLock(run, clock=lambda: self.now, sleep=self.sleep, **options)


def put(run, **changes):
    """A lock of another host, as its rank 0 would have written it."""
    elsewhere = {"host": "node7", "boot_id": "f00", "pid": 4711, "token": "other"}
    holder = replace(Holder.myself(), **elsewhere | changes)
    (run / "LOCK").write_bytes(holder.to_bytes())
    return holder


def files_in(run):
    return sorted(path.name for path in run.iterdir())


def test_one_of_two_has_it_and_the_other_learns_who(tmp_path, processes):
    first, second = processes(), processes()
    assert first.acquire() == "held"
    said = second.acquire()
    assert said.startswith(f"run.dir: {tmp_path} is in use by process {first.process.pid} on ")
    assert os.uname().nodename in said and time.strftime(" since %Y-%m-%d ") in said
    assert files_in(tmp_path) == ["LOCK"]
    first.end()
    second.end()
    assert files_in(tmp_path) == []


def test_of_several_at_once_exactly_one_has_it(tmp_path, processes):
    put(tmp_path, boot_id=run_lock._boot_id(), started=1)  # of a process that is gone
    started = [processes() for _ in range(4)]
    for each in started:
        each.go()
    said = [each.said() for each in started]
    assert said.count("held") == 1
    (winner,) = (each for each, text in zip(started, said, strict=True) if text == "held")
    # A loser may have met one that lost in its turn: all judge the old lock stale at once.
    names = [f"process {each.process.pid} " for each in started]
    assert all(any(name in text for name in names) for text in said if text != "held")
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == winner.process.pid


def test_a_killed_process_is_known_to_be_dead_at_once(tmp_path, processes):
    first = processes()
    assert first.acquire() == "held"
    first.process.kill()  # and not yet waited for: a zombie
    clock = Clock()
    lock = clock.lock(tmp_path)
    while Holder.read(tmp_path / "LOCK").alive_here:
        time.sleep(0.01)
    lock.acquire()
    assert clock.now == run_lock.SETTLE
    lock.release()
    assert files_in(tmp_path) == []


def test_a_number_that_another_process_was_given_since_is_no_holder(tmp_path):
    put(tmp_path, boot_id=run_lock._boot_id(), pid=os.getpid(), started=1)
    Clock().lock(tmp_path).acquire()


def test_a_container_counts_as_another_host(tmp_path):
    """Its processes have numbers of their own: what is missing here may live there."""
    ours = Holder.myself()
    there = put(tmp_path, boot_id=ours.boot_id, pid_namespace="pid:[1]")
    assert there.alive_here is None and replace(there, pid_namespace="").alive_here is None


def test_another_host_lives_while_its_counter_advances(tmp_path, capfd):
    put(tmp_path)
    beats = iter(range(1, 100))
    clock = Clock(lambda: clock.now % 5 or put(tmp_path, counter=next(beats)))
    with pytest.raises(ConfigError, match="in use by process 4711 on node7 since"):
        clock.lock(tmp_path).acquire()
    assert clock.now == 5
    assert "held by process 4711 on node7" in capfd.readouterr().out
    assert files_in(tmp_path) == ["LOCK"]


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"host": 1}', b"\xff"])
def test_what_stands_still_for_a_minute_is_taken_over(content, tmp_path):
    put(tmp_path)
    if content is not None:
        (tmp_path / "LOCK").write_bytes(content)
    clock = Clock()
    lock = clock.lock(tmp_path)
    lock.acquire()
    assert clock.now == run_lock.STALE + run_lock.SETTLE
    assert Holder.read(tmp_path / "LOCK").pid == os.getpid()
    lock.release()
    assert files_in(tmp_path) == []


def test_a_lock_released_meanwhile_is_taken(tmp_path):
    put(tmp_path)
    clock = Clock(lambda: clock.now < 3 or (tmp_path / "LOCK").unlink(missing_ok=True))
    clock.lock(tmp_path).acquire()
    assert clock.now == 3


def test_of_two_that_take_over_the_last_stays(tmp_path):
    put(tmp_path)
    rival = replace(Holder.myself(), host="node9", boot_id="bad")

    def replaced():
        if Holder.read(tmp_path / "LOCK").pid == os.getpid():
            (tmp_path / "LOCK").write_bytes(rival.to_bytes())

    with pytest.raises(ConfigError, match=r"on node9"):
        Clock(replaced).lock(tmp_path).acquire()


def test_a_restart_of_the_supervisor_inherits_it(tmp_path, processes):
    first, again, other = (processes(L2VIT_RUN_ID=run) for run in ("a", "a", "b"))
    assert first.acquire() == "held"
    assert "in use by process" in other.acquire()
    assert again.acquire() == "held"
    assert Holder.read(tmp_path / "LOCK").pid == again.process.pid
    first.end()
    assert files_in(tmp_path) == ["LOCK"], "the first deleted what is no longer its own"


@pytest.mark.parametrize("taken", [False, True])
def test_the_holder_notices_that_it_lost_it(taken, tmp_path):
    lock = Clock().lock(tmp_path)
    lock.acquire()
    before = Holder.read(tmp_path / "LOCK").counter
    lock.beat()
    assert Holder.read(tmp_path / "LOCK").counter == before + 1 and not lock.lost
    (tmp_path / "LOCK").unlink()
    if taken:
        put(tmp_path)
    lock.beat()
    reason = "taken over by process 4711 on node7" if taken else "deleted"
    assert f"LOCK was {reason}" in lock.lost and "without saving" in lock.lost
    content = (tmp_path / "LOCK").read_bytes() if taken else b""
    lock.release()
    assert files_in(tmp_path) == (["LOCK"] if taken else [])
    assert not taken or (tmp_path / "LOCK").read_bytes() == content


def test_a_lock_that_is_missing_for_a_moment_is_not_lost(tmp_path):
    path, aside = tmp_path / "LOCK", tmp_path / "aside"
    lock = Clock(lambda: aside.exists() and aside.rename(path)).lock(tmp_path)
    lock.acquire()
    path.rename(aside)
    lock.beat()
    assert not lock.lost and path.exists()
    lock.release()


def test_the_thread_beats_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    before = set(threading.enumerate())
    lock = RunLock(tmp_path)
    lock.acquire()
    while Holder.read(tmp_path / "LOCK").counter < 3:
        time.sleep(0.01)
    lock.release()
    assert set(threading.enumerate()) <= before


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", link)
    lock = Clock().lock(tmp_path)
    lock.acquire()
    lock.beat()
    assert Holder.read(tmp_path / "LOCK").counter == 1
    with pytest.raises(ConfigError, match="in use by"):
        Clock().lock(tmp_path, me=replace(Holder.myself(), token="other")).acquire()
    lock.release()
    assert files_in(tmp_path) == []


def test_the_launcher_refuses_before_it_starts_a_rank(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(supervisor.job, "build", lambda *_: pytest.fail("went on to start ranks"))
    config = tmp_path / "config.yaml"
    run = tmp_path / "run"
    config.write_text(
        f"run: {{dir: {run}}}\nmodel: {{name: l2vit_mini}}\nschedule: {{global_batch: 8}}\n"
    )
    options = command.parse(["launch/pretrain.sh", "--config", str(config)])
    with pytest.raises(pytest.fail.Exception, match="went on"):
        supervisor.launch(options)
    run.mkdir()
    first = processes(run)
    first.acquire()
    with pytest.raises(ConfigError, match=f"in use by process {first.process.pid} on") as refused:
        supervisor.launch(options)
    assert refused.value.key == "run.dir"
    first.end()
