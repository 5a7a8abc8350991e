"""The supervisor's decisions, with shell scripts in the place of DeepSpeed and its ranks."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from l2vit.launch import processes, supervisor
from l2vit.launch.supervisor import Supervisor
from l2vit.train import run_dir
from l2vit.train.run_dir import Reached


@pytest.fixture(autouse=True)
def handlers_restored():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(tmp_path: Path, script: str, **options) -> int:
    """Supervise a shell script whose working directory is the run directory."""
    options = {"backoff": 0.01, "run_dir": tmp_path, "length": ("9 epochs", "0 epochs")} | options
    command = ["bash", "-c", f"cd {tmp_path}; echo start >> starts\n{script}"]
    return Supervisor(**options).run(command, dict(os.environ))


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "starts").read_text().splitlines())


DONE = """echo '{"length": ["9 epochs", "0 epochs"]}' > DONE"""


def step(number: str) -> str:
    return f"""printf '{{"step": %d}}\\n' "{number}" >> metrics.jsonl"""


def save(number: int) -> str:
    folder = f"checkpoints/step-{number:08d}"
    return f"mkdir -p {folder}; touch {folder}/checkpoint.json"


def test_success_is_the_done_file_and_nothing_else(tmp_path, capfd):
    assert run(tmp_path, "exit 0") == 1
    assert "DONE is missing" in capfd.readouterr().err
    assert run(tmp_path, f"{DONE}; exit 247") == 0
    longer = ("12 epochs", "0 epochs")
    assert run(tmp_path, "exit 0", length=longer) == 1, "DONE speaks of a shorter run"


@pytest.mark.parametrize(("given", "expected"), [(2, 2), (75, 75)])
def test_no_restart_after_a_wrong_configuration_or_a_stop(tmp_path, given, expected):
    assert run(tmp_path, f"exit {given}", max_restarts=5) == expected
    assert starts(tmp_path) == 1


def test_restarts_while_there_is_progress_and_ends_with_done(tmp_path):
    script = f"n=$(wc -l < starts); {step('$n')}; [ $n -lt 3 ] && exit 1; {DONE}"
    assert run(tmp_path, script, max_restarts=2) == 0
    assert starts(tmp_path) == 3


def test_restarts_are_counted(tmp_path):
    assert run(tmp_path, f"{step('$(wc -l < starts)')}; exit 1", max_restarts=1) == 1
    assert starts(tmp_path) == 2


def test_the_same_step_twice_is_no_passing_fault(tmp_path, capfd):
    assert run(tmp_path, f"{save(40)}; {step('42')}; exit 1", max_restarts=9) == 1
    assert starts(tmp_path) == 2
    assert "failed twice at step 42" in capfd.readouterr().err


def test_giving_up_rules():
    assert not supervisor.hopeless([Reached(7, 0)])
    assert not supervisor.hopeless([Reached(7, 0), Reached(9, 0)])
    assert supervisor.hopeless([Reached(7, 0), Reached(9, 0), Reached(8, 0)])
    assert not supervisor.hopeless([Reached(7, 0), Reached(9, 5), Reached(8, 5)])
    assert supervisor.hopeless([Reached(1, 0), Reached(9, 5), Reached(9, 5)])


def test_backoff_doubles(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(Supervisor, "_pause", lambda self, seconds: not pauses.append(seconds))
    script = "n=$(wc -l < starts); c=checkpoints/step-0000000$n; mkdir -p $c;"
    script += "touch $c/checkpoint.json; exit 1"
    assert run(tmp_path, script, max_restarts=4, backoff=10) == 1
    assert pauses == [10, 20, 40, 80]


# Two ranks under a launcher that waits for them and reports 75 when both left with 75. READY is
# carried out once both have set their traps.
SET_TRAP = "trap 'echo $LOCAL_RANK >> caught; exit 75' TERM; touch up$LOCAL_RANK"
RANK = f"{SET_TRAP}; while :; do sleep 0.05; done"
TWO_RANKS = f"""
trap 'echo launcher >> caught' TERM
rm -f up*
for r in 0 1; do LOCAL_RANK=$r bash -c "{RANK.replace("$", chr(92) + "$")}" & pids="$pids $!"; done
while [ ! -e up0 ] || [ ! -e up1 ]; do sleep 0.05; done
READY
for p in $pids; do wait $p; s=$?; done
exit $s
"""


def test_a_signal_reaches_every_rank_once_and_only_the_ranks(tmp_path):
    assert run(tmp_path, TWO_RANKS.replace("READY", "kill -TERM $PPID"), max_restarts=3) == 75
    assert sorted((tmp_path / "caught").read_text().split()) == ["0", "1"]
    assert starts(tmp_path) == 1


def test_a_signal_before_there_are_ranks_ends_the_start(tmp_path, capfd):
    assert run(tmp_path, "kill -TERM $PPID; sleep 60") == 75
    assert "nothing was saved" in capfd.readouterr().err


def test_a_stop_that_could_not_save_is_a_failure(tmp_path):
    failing = TWO_RANKS.replace("exit 75", "exit 1")
    script = failing.replace("READY", "kill -TERM $PPID")
    assert run(tmp_path, script, max_restarts=3) == 1
    # The launcher lost the status, but the checkpoint is there: that is what counts.
    assert run(tmp_path, script.replace("exit $s", f"{save(3)}; exit $s"), max_restarts=3) == 75


def test_a_signal_during_the_pause_ends_the_waiting(tmp_path, monkeypatch):
    # A signaller of the script's would end with its session; a thread of our own does not.
    pause = Supervisor._pause

    def alarmed(self, seconds):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return pause(self, seconds)

    monkeypatch.setattr(Supervisor, "_pause", alarmed)
    script = f"{step('5')}; exit 1"
    assert run(tmp_path, script, max_restarts=3, backoff=300) == 75
    assert starts(tmp_path) == 1


def test_nothing_is_left_when_the_launcher_dies(tmp_path, capfd):
    stubborn = "trap '' TERM; echo $$ > orphan; while :; do sleep 0.05; done"
    script = f"(LOCAL_RANK=0 bash -c {json.dumps(stubborn).replace('$', chr(92) + '$')}) &\
        while [ ! -s orphan ]; do sleep 0.01; done; kill -9 $$"
    assert run(tmp_path, script) == 1
    assert processes.find(int((tmp_path / "orphan").read_text())) is None
    assert "left behind" in capfd.readouterr().err


def test_ranks_that_hang_after_one_died_are_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "DEATH_GRACE", 0.5)
    ranks = processes.ranks

    def looked(session):
        found = ranks(session)
        if len(found) == 2:
            (tmp_path / "seen").touch()
        return found

    monkeypatch.setattr(processes, "ranks", looked)
    script = """
    LOCAL_RANK=0 bash -c 'sleep 100000; true' &
    LOCAL_RANK=1 bash -c 'while [ ! -e seen ]; do sleep 0.05; done' &
    wait"""
    # It returns at all only if it does not wait for the sleeping rank.
    assert run(tmp_path, script) == 1
    assert "killing them" in capfd.readouterr().err


def test_a_process_that_nothing_ends_is_given_up(tmp_path, monkeypatch, capfd):
    """The kernel may hold one (a dead file server, a broken GPU): no signal arrives here either."""
    monkeypatch.setattr(processes, "KILLED", 0.2)
    monkeypatch.setattr(supervisor, "DEATH_GRACE", 0.2)
    send, end_session = processes.send, processes.end_session
    monkeypatch.setattr(processes, "send", lambda pids, number: None)
    monkeypatch.setattr(
        processes, "end_session", lambda session, grace: end_session(session, grace=0)
    )
    try:
        assert run(tmp_path, "sleep 3600 & echo $! > held; exit 1") == 1
        held = (tmp_path / "held").read_text().strip()
        assert f"cannot end process {held}:" in capfd.readouterr().err
    finally:
        send([int((tmp_path / "held").read_text())], signal.SIGKILL)


def test_loader_workers_are_not_ranks():
    """They inherit the mark; a signal to them would look like a crash of the loader."""
    script = "for r in 0 1; do LOCAL_RANK=$r bash -c 'sleep 60 & wait' & echo $!; done; wait"
    launcher = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        started = sorted(int(launcher.stdout.readline()) for _ in range(2))
        while len(processes.members(launcher.pid)) < 5:
            time.sleep(0.01)
        assert processes.ranks(launcher.pid) == started
    finally:
        assert processes.end_session(launcher.pid, grace=5.0) == 5
        launcher.wait()
        launcher.stdout.close()


def test_progress_is_read_from_the_run_directory(tmp_path):
    assert run_dir.reached(tmp_path) == Reached(0, 0)
    for number, complete in ((100, True), (200, True), (300, False)):
        folder = tmp_path / "checkpoints" / f"step-{number:08d}"
        folder.mkdir(parents=True)
        if complete:
            (folder / "checkpoint.json").touch()
    assert run_dir.reached(tmp_path) == Reached(200, 200)
    records = [{"step": 250}, {"step": 251}, {"message": "no step"}]
    lines = "\n".join(map(json.dumps, records)) + '\n{"step": 26'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert run_dir.reached(tmp_path) == Reached(251, 200)
