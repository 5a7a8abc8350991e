"""Two hosts on one machine: network namespaces joined by one wire, which can be cut."""

import contextlib
import os
import signal
import subprocess


class Hosts:
    """Two namespaces; removed together with the wire."""

    def __init__(self):
        tag = f"{os.getpid() % 100000}"
        subnet = f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self.names = [f"l2v{tag}{letter}" for letter in "ab"]
        self.wires = [f"w{tag}{letter}" for letter in "ab"]
        self.addresses = [f"{subnet}.{number}" for number in (1, 2)]
        self.spared: set[int] = set()
        """Processes that `kill_all_on` leaves, such as a host's ssh daemon."""

    def make(self):
        for name in self.names:
            self.ip("netns", "add", name)
        first, second = self.wires
        self.ip("link", "add", first, "type", "veth", "peer", "name", second)
        for name, wire, address in zip(self.names, self.wires, self.addresses, strict=True):
            self.ip("link", "set", wire, "netns", name)
            self.ip("-n", name, "addr", "add", f"{address}/24", "dev", wire)
            self.ip("-n", name, "link", "set", "lo", "up")
            self.ip("-n", name, "link", "set", wire, "up")

    def remove(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def kill_all_on(self, host: int):
        """SIGKILL to everything that runs on a host."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.names[host]], check=True, capture_output=True, text=True
        )
        for pid in set(map(int, found.stdout.split())) - self.spared:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wire(self, state: str):
        self.ip("-n", self.names[0], "link", "set", self.wires[0], state)

    @staticmethod
    def ip(*arguments: str):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)
