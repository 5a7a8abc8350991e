"""Disturbs a small run again and again: its weights must be those of a run left alone.

Two real ranks train a miniature of the model under the launcher's own supervisor. Kills, stops,
a full disk, damaged checkpoints, a lost shard and, as root, a cut wire between two hosts (network
namespaces, each with a supervisor of its own) come in an order that the seed decides. A run that
ends is started again, as its user would; at its end its checkpoint is compared, bit for bit.

    python benchmarks/chaos.py [--events 200] [--seed 0] [--only KIND ...] [--json FILE]

Exit status 1 if any weight differs or a run did not go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed"), str(Path(__file__).parent)]

import chaos_hosts  # noqa: E402
import chaos_kinds  # noqa: E402
import small_runs  # noqa: E402
from chaos_hosts import Place, Run  # noqa: E402
from namespaces import Hosts  # noqa: E402

from l2vit.train import checkpoint  # noqa: E402
from l2vit.train.checkpoint import Reader  # noqa: E402

EVENTS_OF_A_RUN = 10
LENGTH = "100 steps"
PATIENCE = 900.0
"""Seconds after which a run that did not go on counts as stuck."""
SETTINGS = {
    "model__name": "l2vit_mini",
    "model__args": {"depths": [2, 2]},
    "model__window_size": 4,
    "model__drop_path_rate": 0.1,
    "data__input_size": 32,
    "eval__every": "100000 steps",
    "checkpoint__max_failures": 1000,
    "schedule__length": LENGTH,
    "faults__hang_seconds": 8,
}


@dataclass(frozen=True)
class Planned:
    """An event of the schedule: what, after how many more steps, and the seed of its choices."""

    kind: str
    after: int
    seed: int


@dataclass(frozen=True)
class Happened:
    """A line of the table."""

    run: int
    hosts: int
    kind: str
    step: int
    what: str
    lost: int
    """Steps that had to be trained again."""
    seconds: float
    """From the event until the run had passed the step it had reached."""


def schedule(
    events: int, seed: int, kinds: Sequence[str], *, two_hosts: bool
) -> list[tuple[int, list[Planned]]]:
    """(hosts, events) of each run; every kind comes once before any comes again."""
    choose = random.Random(seed)
    decks: dict[int, list[str]] = {1: [], 2: []}
    planned = []
    for number in range(-(-events // EVENTS_OF_A_RUN)):
        hosts = 1 + (number % 2 if two_hosts else 0)
        deck, listed = decks[hosts], []
        for _ in range(min(EVENTS_OF_A_RUN, events - number * EVENTS_OF_A_RUN)):
            if not deck:
                deck += [k for k in kinds if hosts == 2 or k not in chaos_kinds.NEED_TWO_HOSTS]
                choose.shuffle(deck)
            listed.append(Planned(deck.pop(), choose.randint(2, 9), choose.getrandbits(32)))
        planned.append((hosts, listed))
    return planned


def disturb(run: Run, number: int, planned: list[Planned]) -> Iterator[Happened]:
    """Let each event happen, and yield it once the run has got over it; takes it off the list."""
    while planned:
        event = planned[0]
        target = run.reached().step + event.after
        if not go_on(run, lambda target=target: run.reached().step >= target):
            return
        planned.pop(0)
        recovery = Recovery(run, ends=event.kind in chaos_kinds.END_THE_RUN)
        step, what = run.reached().step, chaos_kinds.KINDS[event.kind](run, draw(event))
        go_on(run, recovery)
        lost, seconds = recovery.lost, time.monotonic() - recovery.began
        yield Happened(number, len(run.hosts), event.kind, step, what, lost, seconds)


def draw(event: Planned) -> random.Random:
    """What the event chooses by."""
    return random.Random(event.seed)


class Recovery:
    """Whether a run has got over an event: it is past the step it had reached."""

    def __init__(self, run: Run, *, ends: bool) -> None:
        self._run, self._ends = run, ends
        self._mark, self._highest = run.mark(), run.reached().step
        self.began, self.lost = time.monotonic(), 0
        self._resumed = False

    def __call__(self) -> bool:
        step, resumed = self._run.reached().step, self._run.resumed_at(self._mark)
        if resumed is None:
            if not self._ends:
                return step > self._highest
            self._highest = max(self._highest, step)
            return False
        self.lost = max(self.lost, self._highest - resumed)
        return step > self._highest


def go_on(run: Run, reached: Callable[[], bool]) -> bool:
    """Start again what ended until ``reached``; False when the run finished instead.

    Raises:
        TimeoutError: nothing happened for `PATIENCE` seconds.
    """
    until = time.monotonic() + PATIENCE
    while not run.finished():
        if reached():
            return True
        run.start_ended()
        if time.monotonic() > until:
            raise TimeoutError(f"stuck at {run.reached()}\n{run.said()[-6000:]}")
        time.sleep(0.02)
    return False


def differences(directory: Path, expected: Path) -> list[str]:
    """Tensors of the final checkpoint that differ from the uninterrupted run's.

    The ranks average BatchNorm's statistics at every save: one out of turn rounds once more.
    """
    found, wanted = (Reader(checkpoint.find(run)) for run in (directory, expected))
    found.verify()
    differ = sorted(found.tensors.keys() ^ wanted.tensors.keys())
    for key in found.tensors.keys() & wanted.tensors.keys():
        own, other = found.tensor(key), wanted.tensor(key)
        rounded = "running_" in key and torch.allclose(own, other, rtol=1e-5, atol=1e-6)
        if not rounded and not torch.equal(own, other):
            differ.append(key)
    return differ


class Campaign:
    """All runs of one call, in one folder."""

    def __init__(self, folder: Path, wire: Hosts | None) -> None:
        self.folder, self.wire = folder, wire
        self.shards = small_runs.build_shards(folder, 80)
        self.table: list[Happened] = []
        self.failures: list[str] = []
        self.expected = folder / "expected"

    def run(self, name: str, hosts: int) -> Run:
        """A run that has not begun, on a small disk of its own where that can be made."""
        disk = self.folder / name
        disk.mkdir()
        shards = disk.with_suffix(".shards")
        shutil.copytree(self.shards, shards)
        config = small_runs.settings(shards, disk.with_suffix(".settings"), **SETTINGS)
        places = [Place("127.0.0.1")]
        if hosts == 2 and self.wire is not None:
            listed = zip(self.wire.addresses, self.wire.names, strict=True)
            places = [Place(address, namespace) for address, namespace in listed]
        return Run(config, disk, places, LENGTH, shards=shards, wire=self.wire)

    def uninterrupted(self) -> None:
        """Leave one run alone and keep its last checkpoint."""
        with self.run("uninterrupted", 1) as run:
            go_on(run, lambda: False)
            shutil.copytree(checkpoint.find(run.directory), self.expected)

    def disturbed(self, number: int, hosts: int, planned: list[Planned]) -> None:
        """Runs until all planned events have happened; usually one run holds them."""
        part = 0
        while planned:
            name = f"run-{number}-{part}"
            with self.run(name, hosts) as run:
                try:
                    for happened in disturb(run, number, planned):
                        self.table.append(happened)
                        print(line(len(self.table), happened), flush=True)
                    go_on(run, lambda: False)
                    differ = differences(run.directory, self.expected)
                except (TimeoutError, OSError, ValueError) as error:
                    self.failures.append(f"{name}: {error}")
                    return
            if differ:
                self.failures.append(f"{name}: {len(differ)} tensors differ, {differ[:4]}")
            part += 1


def line(number: int, happened: Happened) -> str:
    """One event of the table."""
    return (
        f"{number:>4} {happened.run:>4} {happened.hosts:>5} {happened.step:>5}"
        f" {happened.kind:<18} {happened.lost:>5} {happened.seconds:>8.1f}  {happened.what}"
    )


def summary(table: Sequence[Happened]) -> str:
    """Events, steps lost and seconds of each kind."""
    lines = [
        f"{'kind':<18} {'events':>6} {'lost (median, most)':>20} {'seconds (median, most)':>24}"
    ]
    for kind in chaos_kinds.KINDS:
        own = [happened for happened in table if happened.kind == kind]
        if own:
            lost, seconds = [h.lost for h in own], [h.seconds for h in own]
            lines.append(
                f"{kind:<18} {len(own):>6} {statistics.median(lost):>13g}, {max(lost):>5}"
                f" {statistics.median(seconds):>17.1f}, {max(seconds):>5.1f}"
            )
    return "\n".join(lines)


@contextlib.contextmanager
def wired() -> Iterator[Hosts | None]:
    """Two hosts joined by a wire; None where they cannot be made."""
    two = Hosts()
    try:
        two.make()
    except (OSError, subprocess.CalledProcessError):
        two.remove()
        yield None
        return
    try:
        yield two
    finally:
        two.remove()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign and print its table; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=chaos_kinds.KINDS, metavar="KIND")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    chaos_hosts.prepare()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        wire = stack.enter_context(wired())
        if wire is None:
            print("one host only: two with a wire between them need root and iproute2")
        campaign = Campaign(folder, wire)
        campaign.uninterrupted()
        kinds = options.only or list(chaos_kinds.KINDS)
        print(f"{'':>4} {'run':>4} {'hosts':>5} {'step':>5} {'event':<18} {'lost':>5} seconds")
        planned = schedule(options.events, options.seed, kinds, two_hosts=wire is not None)
        for number, (hosts, events) in enumerate(planned):
            campaign.disturbed(number, hosts, events)
    print("\n" + summary(campaign.table))
    print(f"\n{len(campaign.table)} events, {len(planned)} runs, seed {options.seed}")
    for failure in campaign.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if not campaign.failures:
        print("every run ended with the weights of the uninterrupted one")
    if options.json:
        content = {"events": [asdict(h) for h in campaign.table], "failures": campaign.failures}
        options.json.write_text(json.dumps(content, indent=1))
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
