"""The agent on another node, with a pipe in the place of ssh."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l2vit.launch import processes, remote, wire
from l2vit.launch.ranks import RUN_ID, Share
from l2vit.launch.remote import RemoteNode

ROOT = Path(__file__).parents[2]
AGENT = [sys.executable, "-u", "-m", "l2vit.launch.agent"]


def share(script: str, ranks: int = 2, **environment: str) -> Share:
    return Share(["bash", "-c", script], environment, 4, ranks, 8, "127.0.0.1", 1234)


@pytest.fixture
def node(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = RemoteNode("node-1", AGENT, lease=60.0)
    found.connect()
    wait(found, "hello")
    yield found
    found.disconnect()


def wait(node: RemoteNode, word: str) -> None:
    while getattr(node, word) is None:
        assert not node.lost, node.lost
        node.poll()
        time.sleep(0.02)


def ended(node: RemoteNode, count: int) -> list:
    found = []
    while len(found) < count:
        assert not node.lost, node.lost
        found += node.poll()
        time.sleep(0.02)
    return found


def test_ranks_get_their_numbers_and_their_output_comes_back(node, capfd):
    node.prepare(run_id="r", address="127.0.0.1", port=0)
    wait(node, "ready")
    assert node.ready["port"] > 0
    script = "echo out $RANK/$WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $GIVEN; echo err >&2; exit $RANK"
    node.start(share(script, GIVEN="a 'b' $c"))
    assert sorted((e.rank, e.status) for e in ended(node, 2)) == [(4, 4), (5, 5)]
    assert node.end(grace=1.0) == (0, [])
    output = capfd.readouterr()
    assert sorted(output.out.splitlines()) == [
        f"out {rank}/8 127.0.0.1:1234 a 'b' $c" for rank in (4, 5)
    ]
    assert output.err.count("err") == 2


def test_a_signal_reaches_the_ranks(node, tmp_path):
    script = f"trap 'exit 75' TERM; touch {tmp_path}/$RANK; while :; do sleep 0.05; done"
    node.prepare(run_id="r", address=None, port=0)
    node.start(share(script))
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.02)
    node.send(signal.SIGTERM)
    assert [e.status for e in ended(node, 2)] == [75, 75]


def test_ranks_save_and_end_when_the_supervisor_is_gone(node, tmp_path):
    """Killed, it closes the pipe; the ranks are asked to save, as after a signal."""
    script = f"""trap 'touch {tmp_path}/saved$RANK; exit 75' TERM
    echo $$ > {tmp_path}/pid$RANK; while :; do sleep 0.05; done"""
    node.prepare(run_id="r", address=None, port=0)
    node.start(share(script))
    while len(list(tmp_path.glob("pid*"))) < 2 or not (tmp_path / "pid5").read_text():
        time.sleep(0.02)
    node._outbox.close(0.0)
    assert node._process.wait() == 0
    assert {p.name for p in tmp_path.glob("saved*")} == {"saved4", "saved5"}
    assert not any(processes.find(int(p.read_text())) for p in tmp_path.glob("pid*"))


def test_ranks_end_when_the_supervisor_is_silent_too_long(tmp_path, monkeypatch):
    """As behind a link that is cut: nothing closes, nothing comes."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = subprocess.Popen(AGENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    words = [
        {"word": "prepare", "run_id": "r", "lease": 1.0, "address": None, "port": 0},
        {"word": "start", "share": share("sleep 1000").to_json()},
    ]
    for word in words:
        process.stdin.write(wire.frame(wire.JSON, json.dumps(word).encode()))
    process.stdin.flush()
    said = b"".join(payload for _, payload in wire.frames(process.stdout, greeted=False))
    assert process.wait() == 0
    assert b"nothing came from the supervisor for 1 s" in said
    process.stdin.close()
    process.stdout.close()


def test_a_silent_agent_is_a_lost_node(node):
    node.lease = 0.5
    os.kill(node._process.pid, signal.SIGSTOP)
    while not node.lost:
        node.poll()
        time.sleep(0.05)
    assert node.lost == "nothing came from it for 0.5 s"


def test_a_killed_agent_is_a_lost_node(node):
    os.kill(node._process.pid, signal.SIGKILL)
    while not node.lost:
        node.poll()
        time.sleep(0.02)
    assert "connection ended" in node.lost


def test_what_an_earlier_start_left_is_ended_and_nobody_else(node, capfd):
    script = ["bash", "-c", "while :; do sleep 0.05; done"]
    left, other = (
        subprocess.Popen(script, env=os.environ | {RUN_ID: name}, start_new_session=True)
        for name in ("mine", "theirs")
    )
    try:
        node.prepare(run_id="mine", address=None, port=0)
        wait(node, "ready")
        assert left.wait() == -signal.SIGTERM
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_words_of_a_login_script_are_skipped(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["bash", "-c", f"echo 'Welcome to node-1!'; exec {' '.join(AGENT)}"]
    node = RemoteNode("node-1", command, lease=60.0)
    node.connect()
    wait(node, "hello")
    node.disconnect()


def test_an_ssh_that_fails_says_why():
    node = RemoteNode("node-1", ["bash", "-c", "echo 'ssh: Permission denied' >&2; exit 255"], 9.0)
    node.connect()
    while not node.lost:
        node.poll()
        time.sleep(0.02)
    assert node.lost == "ssh: Permission denied" and node.refused
    node.disconnect()


def test_only_two_paths_pass_the_remote_shell(tmp_path, monkeypatch):
    folder = tmp_path / "it's $HOME; a `b` folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/pwd")
    *_, remote_command = remote.command("node-1")
    shown = subprocess.run(
        ["sh", "-c", remote_command.replace(" -u -m l2vit.launch.agent", "")],
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == str(folder), shown.stderr


def test_where_the_ranks_meet():
    def node(connection: str) -> RemoteNode:
        return RemoteNode("name", [], 1.0, hello={"connection": connection})

    away = node("10.0.0.9 5000 10.0.0.1 22"), node("10.0.0.9 5001 10.0.0.2 22")
    assert remote.address_of(away) == "10.0.0.1"
    # Started on the first node, whose own name leads to a loopback address.
    own = node("127.0.0.1 5000 127.0.1.1 22"), node("10.0.0.1 5001 10.0.0.2 22")
    assert remote.address_of(own) == "10.0.0.1"
    assert remote.address_of([RemoteNode("name", [], 1.0, hello={})]) == "name"
