"""The supervisor's decisions, with shell scripts in the place of DeepSpeed and its ranks."""

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from l2vit.launch import attempt, processes, supervisor
from l2vit.launch.hosts import Node
from l2vit.launch.job import Job
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


def job(script: str, ranks: int = 1, **options) -> Job:
    """A shell script as every rank; rank 0 is alone unless there are more."""
    nodes = [Node("localhost", tuple(range(ranks)))]
    return Job(["bash", "-c", script], dict(os.environ), nodes, **options)


def run(tmp_path: Path, script: str, ranks: int = 1, **options) -> int:
    """Supervise a shell script whose working directory is the run directory."""
    options = {"backoff": 0.01, "run_dir": tmp_path, "length": ("9 epochs", "0 epochs")} | options
    script = f"cd {tmp_path}; [ $RANK != 0 ] || echo start >> starts\n{script}"
    return Supervisor(**options).run(job(script, ranks))


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


# Two ranks that save when told to; the second carries READY out once both have set their traps.
TWO_RANKS = """
trap 'echo $LOCAL_RANK >> caught; exit 75' TERM
touch up$LOCAL_RANK
while [ ! -e up0 ] || [ ! -e up1 ]; do sleep 0.05; done
[ $RANK = 0 ] || { READY; }
while :; do sleep 0.05; done
"""


def test_a_signal_reaches_every_rank_once(tmp_path):
    script = TWO_RANKS.replace("READY", "kill -TERM $PPID")
    assert run(tmp_path, script, ranks=2, max_restarts=3) == 75
    assert sorted((tmp_path / "caught").read_text().split()) == ["0", "1"]
    assert starts(tmp_path) == 1


def test_a_signal_before_the_ranks_can_catch_it_ends_the_start(tmp_path, capfd):
    assert run(tmp_path, "kill -TERM $PPID; sleep 60") == 75
    assert "nothing was saved" in capfd.readouterr().err


def test_a_stop_that_could_not_save_is_a_failure(tmp_path):
    script = TWO_RANKS.replace("READY", "kill -TERM $PPID").replace("exit 75", "exit 1")
    assert run(tmp_path, script, ranks=2, max_restarts=3) == 1
    for name in ("up0", "up1"):
        (tmp_path / name).unlink()
    # The ranks lost their status, but the checkpoint is there: that is what counts.
    assert run(tmp_path, script.replace("exit 1", f"{save(3)}; exit 1"), ranks=2) == 75


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


def test_nothing_a_rank_started_is_left(tmp_path, capfd):
    stubborn = "trap '' TERM; echo $$ > orphan; while :; do sleep 0.05; done"
    script = f"""(bash -c {json.dumps(stubborn).replace("$", chr(92) + "$")}) &
        while [ ! -s orphan ]; do sleep 0.01; done; kill -9 $$"""
    assert run(tmp_path, script) == 1
    assert processes.find(int((tmp_path / "orphan").read_text())) is None
    assert "left behind" in capfd.readouterr().err


def test_ranks_that_hang_after_one_died_are_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(attempt, "DEATH_GRACE", 0.5)
    # It returns at all only if it does not wait for the sleeping rank.
    assert run(tmp_path, "[ $RANK = 1 ] || sleep 100000; exit 3", ranks=2) == 1
    said = capfd.readouterr().err
    assert "killing them" in said and "rank 1 ended with status 3" in said


def test_a_killed_rank_is_told_of_with_the_likely_reason(tmp_path, capfd):
    assert run(tmp_path, "kill -9 $$") == 1
    said = capfd.readouterr().err
    assert "rank 0 was killed by SIGKILL: " in said and "out of memory" in said


def test_a_stopped_rank_is_ended_after_the_time_a_hang_may_last(tmp_path, capfd):
    script = f"cd {tmp_path}; kill -STOP $$; touch woken"
    supervised = Supervisor(run_dir=tmp_path, length=("9 epochs", "0 epochs"))
    assert supervised.run(job(script, hang_seconds=1.0)) == 1
    assert not (tmp_path / "woken").exists()


def test_a_start_that_cannot_reach_its_peers_is_no_failure(tmp_path, monkeypatch, capfd):
    """Once it trained and failed at step 5, then could not meet the others for three starts."""
    pauses = []
    monkeypatch.setattr(Supervisor, "_pause", lambda self, seconds: not pauses.append(seconds))
    script = f"""case $(wc -l < starts) in
        1) {step("5")}; exit 1;; 5) {step("9")}; {DONE};; *) exit 69;; esac"""
    assert run(tmp_path, script, max_restarts=1, backoff=100) == 0
    assert starts(tmp_path) == 5
    assert pauses == [100, 100, 200, 300], "growing, and never longer than ranks wait for peers"
    assert capfd.readouterr().err.count("no failure of the run") == 3


def test_trying_to_reach_peers_ends_after_the_time_given(tmp_path, capfd):
    assert run(tmp_path, "exit 69", give_up_after=0.05) == 1
    assert 2 <= starts(tmp_path) <= 4
    assert "giving up after" in capfd.readouterr().err


def test_a_peer_lost_after_training_counts_as_a_failure(tmp_path):
    assert run(tmp_path, f"{step('$(wc -l < starts)')}; exit 69", max_restarts=1) == 1
    assert starts(tmp_path) == 2


def test_a_process_that_nothing_ends_is_given_up(tmp_path, monkeypatch, capfd):
    """The kernel may hold one (a dead file server, a broken GPU): no signal arrives here either."""
    monkeypatch.setattr(processes, "KILLED", 0.2)
    send = processes.send
    monkeypatch.setattr(processes, "send", lambda pids, number: None)
    try:
        assert run(tmp_path, "sleep 3600 & echo $! > held; exit 1") == 1
        held = (tmp_path / "held").read_text().strip()
        assert f"cannot end process {held}:" in capfd.readouterr().err
    finally:
        send([int((tmp_path / "held").read_text())], signal.SIGKILL)


def test_all_processes_are_looked_at_twice_however_long_an_end_takes(monkeypatch):
    """One ignores SIGTERM; the child it starts meanwhile is found although nobody knew it."""
    looked = []
    living = processes.living
    monkeypatch.setattr(processes, "living", lambda: looked.append(1) or living())
    script = "trap 'sleep 3600 & echo $!' TERM; echo up; while :; do sleep 0.05; done"
    command = ["bash", "-c", script]
    shell = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert shell.stdout.readline() == "up\n"
    assert processes.end_session(shell.pid, grace=1.0) >= 1
    assert shell.wait() == -signal.SIGKILL
    assert processes.find(int(shell.stdout.readline())) is None
    assert len(looked) <= 4


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
