"""Real ranks in well under a second: forked from a server that has torch and DeepSpeed loaded.

    from forked_ranks import Ranks

    def body(world, path):             # a module-level function of a test module
        ...                            # world is l2vit.train.distributed.World, already started
        return anything_picklable

    results = Ranks(body, 2, path, directory=tmp_path).results()

``Ranks(..., raw=True)`` gives ``body`` no world and starts no process group: it calls
``body(*args)`` with the launcher's variables set, as a program's main expects. Each rank is a
real process over gloo: ``kill(rank, signal)`` it, ``wait()`` for exit statuses, ``log(rank)``
reads what it printed. Test files outside this folder put it on ``sys.path`` first.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import fsspec.config

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preloaded"])
_HERE = str(Path(__file__).parent)
if _HERE not in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # the server finds it there
    os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def free_port():
    """A TCP port nobody listens on now, below those the system gives to outgoing connections.

    Workers of pytest-xdist draw from ports of their own: what one found free, no other takes.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 16
    while True:
        port = 10_000 + 16 * secrets.randbelow(1_250) + worker
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("", port))
            return port


def store_settings():
    """Keys and address of an object store, which the fork server began too early to know."""
    names = (name for name in os.environ if name.startswith(("AWS_", "FSSPEC_")))
    return {name: os.environ[name] for name in names}


class Ranks:
    """``size`` processes that run ``function``; see the module's docstring."""

    def __init__(self, function, size, *args, directory, raw=False, environment=None):
        self.directory = Path(directory) / f"ranks-{time.monotonic_ns()}"
        self.directory.mkdir(parents=True)
        port = free_port()
        self.processes = []
        for rank in range(size):
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "DS_ACCELERATOR": "cpu",
                **store_settings(),
                **(environment or {}),
            }
            variables = {name: str(value) for name, value in variables.items()}
            arguments = (function, args, variables, self.directory, rank, raw)
            process = _CONTEXT.Process(target=_run, args=arguments)
            process.start()
            self.processes.append(process)

    def kill(self, rank, number=signal.SIGKILL):
        """Send a signal to one rank; nothing happens if it has left already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, number)

    def kill_all(self):
        """SIGKILL every rank, as the loss of a node would, and wait until they are gone."""
        for rank in range(len(self.processes)):
            self.kill(rank)
        for process in self.processes:
            process.join()

    def wait(self, timeout=300):
        """Exit statuses of all ranks; when one fails the others are given a moment, then killed."""
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes):
            failed = any(process.exitcode not in (None, 0) for process in self.processes)
            if failed:
                end = min(end, time.monotonic() + 60)
            if time.monotonic() > end:
                self.kill_all()
            multiprocessing.connection.wait(
                [p.sentinel for p in self.processes if p.is_alive()], timeout=0.2
            )
        return [process.exitcode for process in self.processes]

    def log(self, rank):
        """What the rank printed so far."""
        return (self.directory / f"{rank}.log").read_text(errors="replace")

    def results(self, timeout=300):
        """What ``function`` returned on each rank; a failure shows the rank's output."""
        statuses = self.wait(timeout)
        for rank, status in enumerate(statuses):
            if status != 0:
                # The first rank to fail is the cause: the others only lost their peer.
                logs = "\n".join(
                    f"--- rank {r}\n{self.log(r)[-4000:]}" for r in range(len(statuses))
                )
                raise AssertionError(f"rank {rank} ended with {status} of {statuses}\n{logs}")
        return [
            pickle.loads((self.directory / f"{rank}.pickle").read_bytes())
            for rank in range(len(statuses))
        ]


def _run(function, args, variables, directory, rank, raw):
    log = os.open(directory / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(variables)
    fsspec.config.set_conf_env(fsspec.config.conf)  # it read the environment when it was imported
    # A server that the loader's workers were forked from first began with signals blocked.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    import torch

    torch.set_num_threads(1)
    status = 1
    try:
        value = function(*args) if raw else _with_world(function, args)
        status = value if raw and isinstance(value, int) else 0
        temporary = directory / f"{rank}.tmp"
        temporary.write_bytes(pickle.dumps(value))
        temporary.replace(directory / f"{rank}.pickle")
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _with_world(function, args):
    from l2vit.train import distributed

    world = distributed.start(distributed.from_environment())
    try:
        return function(world, *args)
    finally:
        distributed.stop()
