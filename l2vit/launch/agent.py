"""The part of the supervisor that runs on another node: it owns that node's ranks.

``ssh NODE python -m l2vit.launch.agent`` is started by ``l2vit.launch.remote``; everything else
(arguments, environment, token) comes through its standard input, so that no shell reads it and no
list of processes shows it. The supervisor's lease is renewed by every word from it. When the line
ends or nothing comes for too long, the ranks are asked to save and are ended: nobody trains
on unsupervised.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import IO, Any

from l2vit.launch import ranks, wire
from l2vit.launch.ranks import LocalRanks, Share

ORPHAN_GRACE = 120.0
"""Seconds ranks without a supervisor have to save and leave."""
_TICK = 0.1


class Agent:
    """Does what the supervisor says until it says the end, or is gone."""

    def __init__(self, incoming: IO[bytes], outgoing: int) -> None:
        self._incoming = incoming
        self._outbox = wire.Outbox(outgoing, greet=True)
        self._inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._ranks: LocalRanks | None = None
        self._store: socket.socket | None = None
        self._relays: list[threading.Thread] = []
        self._lease = 60.0
        self._heard = time.monotonic()
        self._over = False

    def run(self) -> int:
        """Serve the supervisor; returns the exit status."""
        threading.Thread(target=self._read, name="inbox", daemon=True).start()
        connection = os.environ.get("SSH_CONNECTION", "")
        self._outbox.say(word="hello", host=socket.gethostname(), connection=connection)
        beat = before = time.monotonic()
        while not self._over:
            self._take()
            now = time.monotonic()
            if now - before > 5.0:  # this machine slept: no proof that the supervisor is gone
                self._heard += now - before
            before = now
            if now - beat > wire.BEAT_SECONDS:
                beat = now
                self._outbox.say(word="beat")
            self._report()
            if now - self._heard > self._lease:
                self._abandon(f"nothing came from the supervisor for {self._lease:g} s")
        self._outbox.close(5.0)
        return 0

    def _read(self) -> None:
        for kind, payload in wire.frames(self._incoming):
            self._heard = time.monotonic()
            if kind == wire.JSON:
                self._inbox.put(json.loads(payload))
        self._inbox.put(None)

    def _take(self) -> None:
        try:
            message = self._inbox.get(timeout=_TICK)
        except queue.Empty:
            return
        if message is None:
            self._abandon("the supervisor is gone")
            return
        handler = getattr(self, f"_on_{message.pop('word')}")
        handler(**message)
        self._heard = time.monotonic()  # what took long here was not the supervisor's silence

    def _on_beat(self) -> None:
        pass

    def _on_prepare(self, *, run_id: str, lease: float, address: str | None, port: int) -> None:
        """Clear away an earlier start of this run; open the store's socket where it is ours."""
        from l2vit.train import rendezvous

        self._lease = lease
        if ended := ranks.end_earlier(run_id):
            self._say(f"ended {ended} process(es) that an earlier start of this run had left")
        try:
            if address is not None:
                self._store = rendezvous.listen(address, port)
                port = self._store.getsockname()[1]
        except OSError as error:
            self._outbox.say(word="failed", why=f"cannot listen at {address}:{port}: {error}")
            return
        self._outbox.say(word="ready", port=port)

    def _on_start(self, share: dict[str, Any]) -> None:
        wanted = Share(**share)
        wanted.environment.update({**os.environ, **wanted.environment})
        output, errors = os.pipe(), os.pipe()
        store = self._store.fileno() if self._store is not None else None
        try:
            self._ranks = LocalRanks(wanted, store=store, stdout=output[1], stderr=errors[1])
        except OSError as error:
            self._outbox.say(word="failed", why=f"cannot start {wanted.argv[0]}: {error.strerror}")
        os.close(output[1])
        os.close(errors[1])
        if self._store is not None:
            self._store.close()
        for kind, reader in ((wire.OUTPUT, output[0]), (wire.ERRORS, errors[0])):
            relay = threading.Thread(target=self._relay, args=(kind, reader), daemon=True)
            relay.start()
            self._relays.append(relay)

    def _relay(self, kind: bytes, descriptor: int) -> None:
        while data := os.read(descriptor, 65536):
            self._outbox.output(kind, data)

    def _on_signal(self, number: int) -> None:
        if self._ranks is not None:
            self._ranks.send(number)

    def _on_end(self, grace: float) -> None:
        left, held = self._ranks.end(grace=grace) if self._ranks is not None else (0, [])
        self._report()
        for relay in self._relays:
            relay.join(2.0)
        self._outbox.say(word="closed", left=left, held=held)
        self._over = True

    def _report(self) -> None:
        if self._ranks is not None:
            for ended in self._ranks.poll():
                self._outbox.say(word="ended", rank=ended.rank, status=ended.status, why=ended.why)

    def _abandon(self, why: str) -> None:
        """End the ranks without a supervisor: ask them to save, wait, end what is left."""
        self._over = True
        if self._ranks is None:
            return
        if self._ranks.alive:
            self._say(f"{why}; asking this node's ranks to save and stop")
        self._ranks.send(signal.SIGTERM)
        until = time.monotonic() + ORPHAN_GRACE
        while self._ranks.alive and time.monotonic() < until:
            self._ranks.poll()
            time.sleep(_TICK)
        self._ranks.end(grace=5.0)

    def _say(self, text: str) -> None:
        line = f"[launch] {socket.gethostname()}: {text}\n"
        self._outbox.output(wire.ERRORS, line.encode())


def main() -> int:
    """Serve the supervisor at the other end of standard input and output."""
    outgoing = os.dup(1)
    os.dup2(2, 1)  # a stray print must not fall into the frames
    for number in (signal.SIGINT, signal.SIGHUP):
        with contextlib.suppress(ValueError):
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return Agent(sys.stdin.buffer, outgoing).run()


if __name__ == "__main__":
    os._exit(main())  # the thread that reads standard input may still hold it
