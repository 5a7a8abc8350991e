"""Two hosts that share a disk: network namespaces joined by one wire, which can be cut.

Each host runs ``bash launch/pretrain.sh --no_ssh ...`` as its user would. The route over ssh
needs an ssh daemon: give it with TWO_NODES_SSH=hostfile (see docs/cluster.md).
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l2vit.launch import processes

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import small_runs
from forked_ranks import free_port
from namespaces import Hosts

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.multinode, pytest.mark.ci]


@pytest.fixture(scope="module")
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("needs the ip command (package iproute2)")
    two = Hosts()
    try:
        two.make()
        subprocess.run(["ip", "netns", "exec", two.names[0], "true"], check=True)
    except (OSError, subprocess.CalledProcessError):
        two.remove()
        pytest.skip("making network namespaces is not permitted here")
    yield two
    two.remove()


@contextlib.contextmanager
def launched(hosts: Hosts, folder: Path, *arguments: str):
    """The same command on each host; yields both processes, their output in N.log."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    port = str(free_port())
    running = []
    for node, name in enumerate(hosts.names):
        command = ["ip", "netns", "exec", name, "bash", str(ROOT / "launch" / "pretrain.sh")]
        command += ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node)]
        command += ["--master_addr", hosts.addresses[0], "--master_port", port]
        more = {"GLOO_SOCKET_IFNAME": hosts.wires[node], "VIRTUAL_ENV": sys.prefix}
        more |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "L2VIT_NPROC": ""}
        log = (folder / f"{node}.log").open("w")
        process = subprocess.Popen(
            [*command, *arguments],
            env=os.environ | more,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()
        running.append(process)
    try:
        yield running
    finally:
        for process in running:
            ranks = processes.sessions_below(process.pid)
            for session in (*ranks, process.pid):
                processes.end_session(session, grace=0.0)
            process.wait()


def logs(folder: Path) -> str:
    return "\n".join((folder / f"{node}.log").read_text() for node in (0, 1))


def saved(run: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(p.parent.name[5:]) for p in run.glob("checkpoints/step-*/checkpoint.json"))


def wait_for_step(run: Path, step: int, nodes, folder: Path):
    while max(saved(run), default=0) <= step:
        assert all(node.poll() is None for node in nodes), logs(folder)
        time.sleep(0.2)


def test_cut_off_stopped_and_finished(hosts, tmp_path, request):
    """A cut wire ends both hosts; a signal to one stops both; every launch continues."""
    shards, run = small_runs.build_shards(tmp_path, 80), tmp_path / "run"
    small = {"model__name": "l2vit_mini", "model__window_size": 4, "model__drop_path_rate": 0.0}
    small |= {"data__input_size": 32, "eval__every": "100000 steps", "faults__hang_seconds": 12}
    config = ["--config", str(small_runs.settings(shards, run, **small))]
    endless = [*config, "schedule.length=100000 steps"]

    with launched(hosts, tmp_path, *endless) as nodes:
        wait_for_step(run, 0, nodes, tmp_path)
        hosts.wire("down")
        # Nobody ends these but themselves.
        assert [node.wait() for node in nodes] == [1, 1], logs(tmp_path)
    hosts.wire("up")
    assert "rank 1 made no progress for" in logs(tmp_path)
    assert "does not answer" in logs(tmp_path)
    assert not (run / "DONE").exists()
    cut = saved(run)[-1]

    with launched(hosts, tmp_path, *endless) as nodes:
        wait_for_step(run, cut, nodes, tmp_path)
        nodes[1].send_signal(signal.SIGTERM)
        assert [node.wait() for node in nodes] == [75, 75], logs(tmp_path)
    assert f"continuing from {run}/checkpoints/step-{cut:08d}" in logs(tmp_path)
    stopped = saved(run)[-1]
    assert f"stopped by a signal after saving step {stopped}" in logs(tmp_path)

    if not request.config.getoption("--slow"):
        return
    with launched(hosts, tmp_path, *config, f"schedule.length={stopped + 4} steps") as nodes:
        assert [node.wait() for node in nodes] == [0, 0], logs(tmp_path)
    assert f"continuing from {run}/checkpoints/step-{stopped:08d}" in logs(tmp_path)
    assert json.loads((run / "DONE").read_text())["step"] == stopped + 4


@pytest.mark.skipif("TWO_NODES_SSH" not in os.environ, reason="TWO_NODES_SSH names no hostfile")
def test_over_ssh(tmp_path):
    """Opt-in: password-less ssh to the hosts of a hostfile, which share tmp and code."""
    shards, run = small_runs.build_shards(tmp_path, 80), tmp_path / "run"
    small = {"model__name": "l2vit_mini", "model__window_size": 4, "data__input_size": 32}
    config = small_runs.settings(shards, run, **small, schedule__length="6 steps")
    command = ["bash", str(ROOT / "launch" / "pretrain.sh")]
    command += ["--hostfile", os.environ["TWO_NODES_SSH"], "--config", str(config)]
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "DONE").read_text())["step"] == 6
