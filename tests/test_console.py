"""Output that nobody takes (closed terminal, full disk) stops nothing that must go on or end."""

import contextlib
import io
import itertools
import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from l2vit import cli
from l2vit.launch import rank, supervisor
from l2vit.launch.hosts import Node
from l2vit.launch.job import Job
from l2vit.train import metrics, report, watchdog
from l2vit.train.distributed import World
from l2vit.train.throughput import PhaseClock, Place

ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")


def hung_up():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def on_a_full_disk():
    return Path("/dev/full").open("w")


@pytest.fixture(params=[hung_up, on_a_full_disk])
def no_output(request):
    """``with no_output():`` output and errors of this process cannot be written."""

    @contextlib.contextmanager
    def replaced():
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = streams = request.param(), request.param()
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in streams:
                with contextlib.suppress(OSError):
                    stream.close()

    return replaced


def test_telling_nobody_is_no_error(no_output):
    with no_output():
        for number in range(3):
            cli.tell(f"line {number}")
            cli.tell(f"line {number}", error=True)


def test_output_is_kept_for_readers_that_are_there(capsys):
    cli.tell("step 1", end="")
    cli.tell("trouble", error=True)
    assert capsys.readouterr() == ("step 1", "trouble\n")


def test_the_exit_status_is_the_programs(no_output):
    """The interpreter, which flushes at its end, would make it 120: no job is queued again then."""
    with no_output():
        print("a line that stays in the buffer")
        assert cli.run(lambda: cli.tell("another") or 75, program="test") == 75
        sys.stdout.flush()
        sys.stderr.flush()


def test_the_watchdog_ends_the_process_all_the_same(no_output, monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog, "os", SimpleNamespace(_exit=ended.append))
    dog = watchdog.Watchdog(PhaseClock(), world=ALONE, limit=0)
    dog._store = dist.HashStore()
    with no_output():
        dog._report(9.0, patience=0.0)
    assert ended == [watchdog.EXIT_STATUS]
    monkeypatch.setattr(dog, "_beats", lambda beat: iter([(Place(3, "data", 2), 1e6)]))
    with no_output():
        dog._last_resort()
    assert ended == [watchdog.EXIT_STATUS] * 2


def test_a_rank_without_its_launcher_stops(no_output, monkeypatch):
    """The launcher was the one that read its output."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    monkeypatch.setattr(rank.time, "sleep", lambda seconds: None)
    with no_output():
        rank._watch([os.getpid(), 0])
    assert sent == [signal.SIGTERM, signal.SIGKILL]


def test_a_run_whose_terminal_was_closed_may_save(no_output, tmp_path):
    """SIGHUP comes with it: the supervisor tells the ranks instead of dying of its own message."""
    script = f"""cd {tmp_path}
    trap "exit 75" TERM; kill -HUP $PPID; while :; do sleep 0.05; done"""
    before = {number: signal.getsignal(number) for number in supervisor._FORWARDED}
    saving = Job(["bash", "-c", script], dict(os.environ), [Node("localhost", (0,))])
    try:
        supervised = supervisor.Supervisor(run_dir=tmp_path, length=("9 epochs", "0 epochs"))
        with no_output():
            assert supervised.run(saving) == 75
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- between two records


def test_lines_between_records_show_the_running_mean(tmp_path, capfd, monkeypatch):
    """A line after some seconds of silence; in a file that grows for days, rarer with time."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    door = metrics.Metrics(tmp_path, main=True, total_steps=1000)
    asked = []

    def rates():
        asked.append(now[0])
        return {"images_per_second": 1234.5, "seconds_left": 61.0}

    for step in range(1, 401):
        now[0] += 1
        door.note_loss(float("nan") if step == 3 else float(step))
        door.progress(step, float(step), rates)
    door.close()
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "step 5/1,000  loss 5.0000  (mean 3.0000)  1,234 img/s  00:01:01 left"
    last = int(asked[-1] - 1000)
    assert f"loss {last}.0000  (mean {sum(range(last - 99, last + 1)) / 100:.4f})" in lines[-1]
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert gaps[0] == 5 and gaps == sorted(gaps) and 15 < gaps[-1] <= 20
    assert (tmp_path / "metrics.jsonl").read_text() == "", "the console only"


def test_the_running_mean_begins_anew_after_a_rollback(tmp_path, capfd):
    door = metrics.Metrics(tmp_path, main=True, total_steps=9)
    door.note_loss(900.0)
    door.rewind(0)
    door.note_loss(2.0)
    door.log(1, {"loss": 2.0}, images_seen=1)
    door.close()
    assert "loss 2.0000  (mean 2.0000)" in capfd.readouterr().out


# -- records on a full disk


@contextlib.contextmanager
def files_end_at(size):
    """No file may grow beyond ``size`` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_records_wait_for_room(tmp_path, capfd, monkeypatch):
    """A file too large stands in for the full disk; TensorBoard's thread dies of it."""
    monkeypatch.setattr(threading, "excepthook", lambda error: None)
    door = metrics.Metrics(tmp_path, main=True, total_steps=99)
    door.log(1, {"value": 0.5}, images_seen=1)
    with files_end_at(2000):
        for step in range(2, 70):
            door.log(step, {"value": 0.5}, images_seen=step)
        assert door.path.stat().st_size == 2000, "it ends within a record"
    door.log(70, {"value": 0.5}, images_seen=70)
    door.close()
    assert [json.loads(line)["step"] for line in door.path.open()] == list(range(1, 71))
    assert capfd.readouterr().err.count("records wait for room") == 1
    boards = sorted(tmp_path.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(boards) == 2 and b"train/value" in boards[1].read_bytes()


def test_a_report_without_room_is_no_failure(tmp_path, capfd):
    """The run has saved and must say so by its exit status."""
    door = metrics.Metrics(tmp_path, main=True, total_steps=9)
    (tmp_path / report.NAME).mkdir()
    report.finish(tmp_path, door, main=True, done=False)
    door.close()
    said = capfd.readouterr()
    assert "cannot write" in said.err and "the same command continues it" in said.out


def test_muting_keeps_the_descriptor_usable():
    stream = hung_up()
    cli.mute(stream)
    stream.write("x")
    stream.flush()
    stream.close()
    cli.mute(io.StringIO())  # no descriptor: nothing to do
