"""How the tests are run: nothing they start outlives them."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("and_all_it_started.py")


def test_what_a_command_leaves_behind_is_ended():
    """In a session of its own, with its parent gone, and deaf to SIGTERM; it holds the output."""
    orphan = "trap '' TERM; while :; do sleep 3600; done"
    for script in (f'setsid bash -c "{orphan}" & exit 7', f'(setsid bash -c "{orphan}" &); exit 7'):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "bash", "-c", script],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 7 and "left behind" in done.stderr


def test_its_exit_status_and_nothing_else():
    for script, status in (("echo out; exit 5", 5), ("kill -KILL $$", 137), ("true", 0)):
        command = [sys.executable, str(SCRIPT), "bash", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, "")


def test_orphans_are_buried_while_it_runs():
    """A test that waits until a process is gone must not wait for a zombie."""
    script = "pid=$(bash -c 'sleep 0.1 >&2 & echo $!'); while kill -0 $pid; do sleep 0.05; done"
    command = [sys.executable, str(SCRIPT), "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0


def test_versions_names_its_two_ends():
    script = Path(__file__).with_name("versions.sh")
    for arguments in ([], ["oldest"]):
        done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stderr[:6], done.stdout) == (2, "usage:", "")
