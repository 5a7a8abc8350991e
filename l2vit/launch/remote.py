"""One other node as the supervisor sees it: an ssh connection with our agent at its end."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2vit.launch import processes, wire
from l2vit.launch.ranks import Ended, Share

SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20")
KEEP_ALIVE = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3")
_CLOSING = 30.0
_REFUSALS = (
    "Could not resolve hostname",
    "Permission denied",
    "Host key verification failed",
    "No such file or directory",
    "command not found",
)


def command(host: str, *, ssh_arguments: Sequence[str] = ()) -> list[str]:
    """The ssh command that starts our agent on ``host``, in the directory we are in.

    Only two paths go through the remote shell, quoted; everything else goes through the pipe.
    """
    directory = str(Path.cwd())
    search = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH", ""), directory)))
    remote = (
        f"cd {shlex.quote(directory)} && exec env PYTHONPATH={shlex.quote(search)}"
        f" {shlex.quote(sys.executable)} -u -m l2vit.launch.agent"
    )
    return [*SSH, *KEEP_ALIVE, *ssh_arguments, host, "--", remote]


@dataclass
class RemoteNode:
    """A node's agent: what it said so far and what it is to do.

    ``connect`` and every word to it return at once; ``poll`` looks at what came meanwhile.
    """

    host: str
    ssh: list[str]
    lease: float
    """Seconds of silence after which the node counts as lost."""
    hello: dict[str, Any] | None = None
    ready: dict[str, Any] | None = None
    closed: dict[str, Any] | None = None
    lost: str = ""
    """Why the node is lost, once it is."""
    _ended: list[Ended] = field(default_factory=list)
    _errors: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def connect(self) -> None:
        """Start ssh."""
        self._process = subprocess.Popen(
            self.ssh,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._outbox = wire.Outbox(os.dup(self._process.stdin.fileno()))
        self._process.stdin.close()
        self._heard = self._beaten = self._polled = time.monotonic()
        self._threads = [
            threading.Thread(target=target, name=f"{self.host}-{target.__name__}", daemon=True)
            for target in (self._read_errors, self._read)
        ]
        for thread in self._threads:
            thread.start()

    def prepare(self, *, run_id: str, address: str | None, port: int) -> None:
        """Tell the node which run this is and, with an address, to open the store's socket."""
        self._outbox.say(
            word="prepare", run_id=run_id, lease=self.lease, address=address, port=port
        )

    def start(self, share: Share) -> None:
        """Start the node's ranks."""
        self._outbox.say(word="start", share=share.to_json())

    def send(self, number: int) -> None:
        """Send a signal to each of the node's ranks."""
        self._outbox.say(word="signal", number=number)

    def poll(self) -> list[Ended]:
        """The ranks that ended since the last call; keeps the lease and notices a lost node."""
        now = time.monotonic()
        if now - self._polled > 5.0:  # this machine slept: no proof that the node is gone
            self._heard += now - self._polled
        self._polled = now
        if now - self._beaten > wire.BEAT_SECONDS:
            self._beaten = now
            self._outbox.say(word="beat")
        if not self.lost and not self.closed and now - self._heard > self.lease:
            self.lost = f"nothing came from it for {self.lease:g} s"
        with self._lock:
            fresh, self._ended = self._ended, []
        return fresh

    def end(self, *, grace: float) -> tuple[int, list[int]]:
        """End what is left there, as far as it can be reached, and the connection."""
        if not self.lost and self.hello is not None:
            self._outbox.say(word="end", grace=grace)
            until = time.monotonic() + grace + processes.KILLED + _CLOSING
            while not self.closed and not self.lost and time.monotonic() < until:
                self.poll()
                time.sleep(0.05)
        self.disconnect()
        found = self.closed or {}
        return found.get("left", 0), found.get("held", [])

    def disconnect(self) -> None:
        """End ssh; the agent notices and ends what it still has."""
        self._outbox.close(1.0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5 if self.closed else 0.1)
        processes.end_session(self._process.pid, grace=1.0)
        self._process.wait()
        for thread in self._threads:
            thread.join(2.0)

    @property
    def refused(self) -> bool:
        """Whether ssh said something that waiting does not mend."""
        return self.hello is None and any(text in self.lost for text in _REFUSALS)

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        for kind, payload in wire.frames(stream, greeted=False):
            self._heard = time.monotonic()
            if kind == wire.JSON:
                self._understand(json.loads(payload))
            else:
                _pass_on(1 if kind == wire.OUTPUT else 2, payload)
        status = self._process.wait()
        self._threads[0].join(2.0)
        if not self.closed and not self.lost:
            said = self._errors[-1] if self._errors else f"ssh ended with status {status}"
            self.lost = said if self.hello is None else f"the connection ended ({said})"

    def _understand(self, message: dict[str, Any]) -> None:
        word = message.pop("word")
        if word == "ended":
            with self._lock:
                self._ended.append(Ended(**message))
        elif word == "failed":
            self.lost = message["why"]
        elif word in ("hello", "ready", "closed"):
            setattr(self, word, message)

    def _read_errors(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        for line in stream:
            text = line.decode(errors="replace").strip()
            self._errors.append(text)
            del self._errors[:-20]
            if self.hello is not None and not self.closed:
                _pass_on(2, line)


def _pass_on(descriptor: int, data: bytes) -> None:
    """Write what a rank wrote; what nobody takes is dropped."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]


def address_of(nodes: Sequence[RemoteNode]) -> str:
    """The address of the first node that the others can reach.

    That is where our ssh connection to it arrived. Where we are on that node ourselves it may be a
    loopback address: then it is where our connection to another node came from.
    """
    found = [str((node.hello or {}).get("connection", "")).split() for node in nodes]
    candidates = [fields[2] for fields in found[:1] if len(fields) == 4]
    candidates += [fields[0] for fields in found[1:] if len(fields) == 4]
    usable = [address for address in candidates if not address.startswith(("127.", "::1"))]
    return (usable or candidates or [nodes[0].host])[0]
