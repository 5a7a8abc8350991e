"""A rank that does not begin to train ends itself and says where it stands."""

import socket
import subprocess
import sys

import pytest

STANDS = """
import threading, time
def reading_a_disk_that_never_answers():
    threading.Event().wait(60)
reading_a_disk_that_never_answers()
"""
TRAINS = """
import sys, threading, types, time
began = threading.Event()
sys.modules["l2vit.train.throughput"] = types.SimpleNamespace(training_began=began)
began.set()
time.sleep(2)
"""
IMPORTS = (
    'import sys, types; sys.modules["l2vit.train.throughput"] = types.ModuleType("half")' + STANDS
)
CASES = {
    "imports": (IMPORTS, "setup.py", 1),
    "stands": (STANDS, "setup.py", 1),
    "waits": (STANDS, "rendezvous.py", 69),
    "trains": (TRAINS, "setup.py", 0),
}


@pytest.fixture(scope="module")
def ended():
    """Every case at once: a rank that waits for others is given ten seconds more."""
    rank = "from l2vit.launch import rank; rank.watch_start();"
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", f"{rank} exec(compile({body!r}, {file!r}, 'exec'))"],
            env={"RANK": "3", "L2VIT_START_SECONDS": "0.5", "PYTHONPATH": ":".join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (body, file, _) in CASES.items()
    }
    return {
        name: (process.communicate()[1], process.returncode) for name, process in running.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_it_ends_with_a_status_that_says_who_is_to_blame(name, ended):
    said, status = ended[name]
    assert status == CASES[name][2], said
    if name == "trains":
        assert said == ""
        return
    assert f"rank 3 on {socket.gethostname()} has not begun its first step after 0.5 s" in said
    assert "--start-timeout" in said
    assert ("waits for other ranks" in said) is (name == "waits")
    assert ("in reading_a_disk_that_never_answers" in said) is (name != "waits")
