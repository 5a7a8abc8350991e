"""What the ranks of a job tell one another before they train, and what must be the same."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from l2vit import config as configuration
from l2vit import files
from l2vit.data.manifest import MANIFEST_NAME
from l2vit.data.storage import open_source
from l2vit.errors import UserError
from l2vit.train.config import TrainConfig
from l2vit.train.distributed import World
from l2vit.train.provenance import git_commit, versions
from l2vit.train.tasks import DEFAULT

CLOCK_SECONDS = 2.0
"""Clocks that differ by more make logs unreadable and confuse some file servers."""
MEMORY_SHARE = 0.9
"""A rank with less free memory than this share of the median shares its device with somebody."""
VISIBLE_SECONDS = 30.0
"""A shared file system may take so long to show one host what another wrote."""


@dataclass(frozen=True)
class Facts:
    """One rank and its host."""

    rank: int
    host: str
    device: str
    driver: str
    free_gib: float
    """Free device memory, or host memory without a device."""
    clock: float
    """Seconds since the epoch when all ranks passed the same barrier."""
    same: dict[str, str] = field(default_factory=dict)
    """What must be equal on all ranks: versions, code, configuration, data."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with the cluster and what to do about it."""

    text: str
    fix: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.text}; {self.fix}"


def collect(config: TrainConfig, world: World) -> list[Facts]:
    """Every rank's facts, on every rank. Takes milliseconds."""
    world.barrier()
    now = time.time()
    own = Facts(
        rank=world.rank,
        host=socket.gethostname(),
        device=_device_name(world.device),
        driver=_driver(world.device),
        free_gib=_free_gib(world.device),
        clock=now,
        same=_same(config),
    )
    return world.gather(own)


def _same(config: TrainConfig) -> dict[str, str]:

    found = dict(versions())
    found["code"] = git_commit()
    found["configuration"] = hashlib.sha256(configuration.dump(config).encode()).hexdigest()[:12]
    if config.task == DEFAULT:
        found["manifest"] = manifest_hash(config.data.train)
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def manifest_hash(directory: Path | str) -> str:
    """First digits of the hash the manifest records; what is wrong where there is none."""
    try:
        raw = json.loads(open_source(directory).read(MANIFEST_NAME))
        return str(raw["hash"])[:12]
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return "not readable"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return "-"
    try:
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
        return next(w for w in words if w[0].isdigit() and "." in w)
    except (OSError, IndexError, StopIteration):
        return "unknown"


def _free_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


# -- judging


def differences(facts: Sequence[Facts]) -> list[Problem]:
    """What differs between ranks and should not; names the ranks and hosts in the minority."""
    problems = [
        p
        for key in facts[0].same
        if (p := _odd(facts, key, functools.partial(_value, key), fatal=True))
    ]
    for key, value in (("device", lambda f: f.device), ("driver", lambda f: f.driver)):
        problem = _odd(facts, key, value, fatal=False)
        problems += [problem] if problem else []
    return [*problems, *_clocks(facts), *_memories(facts)]


def _value(key: str, facts: Facts) -> str:
    return facts.same.get(key, "missing")


_FIXES = {
    "configuration": "start every node with the same file and overrides",
    "manifest": "make data.train the same finished shard directory on every node",
    "code": "put the same commit on every node",
    "device": "expect the pace of the slowest",
    "driver": "install the same driver on every node",
}


def _odd(
    facts: Sequence[Facts], key: str, value: Callable[[Facts], str], *, fatal: bool
) -> Problem | None:
    common = Counter(value(f) for f in facts).most_common(1)[0][0]
    odd = [f for f in facts if value(f) != common]
    if not odd:
        return None
    others = ", ".join(f"rank {f.rank} on {f.host} has {value(f) or 'none'}" for f in odd[:4])
    more = f" and {len(odd) - 4} more ranks differ" if len(odd) > 4 else ""
    text = f"{key} differs: {others}{more}; the others have {common or 'none'}"
    return Problem(text, _FIXES.get(key, f"install the same {key} on every node"), fatal)


def _clocks(facts: Sequence[Facts]) -> list[Problem]:
    middle = sorted(f.clock for f in facts)[len(facts) // 2]
    return [
        Problem(
            f"the clock of {f.host} (rank {f.rank}) is {f.clock - middle:+.1f} s off",
            "let chrony or ntpd keep it",
        )
        for f in facts
        if abs(f.clock - middle) > CLOCK_SECONDS
    ]


def _memories(facts: Sequence[Facts]) -> list[Problem]:
    if facts[0].driver == "-":  # ranks of a host share its memory: nothing to compare
        return []
    middle = sorted(f.free_gib for f in facts)[len(facts) // 2]
    return [
        Problem(
            f"rank {f.rank} on {f.host} has {f.free_gib:.1f} GiB free, others {middle:.1f}",
            "end what else runs on that device (nvidia-smi)",
        )
        for f in facts
        if f.free_gib < MEMORY_SHARE * middle
    ]


# -- the shared directory


def shared_directory(
    directory: Path, world: World, *, seconds: float = VISIBLE_SECONDS
) -> list[Problem]:
    """Whether what rank 0 renames into ``directory`` appears, whole, on every host, and back.

    Every rank calls this and gets the same answer.
    """
    probe = directory / ".preflight"
    token = world.broadcast(f"{time.time_ns()}-{os.getpid()}")
    problem = ""
    try:
        if world.main:
            probe.mkdir(parents=True, exist_ok=True)
            _put(probe / "from-0", token)
        world.barrier()
        problem = _await(probe / "from-0", token, seconds)
        if world.local_rank == 0 and not problem:
            _put(probe / f"from-host-of-{world.rank}", token)
    except (OSError, UserError) as error:
        problem = f"cannot write: {error}"
    heads = world.gather((world.rank, world.local_rank, socket.gethostname(), problem))
    problems = [f"{host}: {text}" for _, _, host, text in heads if text]
    if world.main and not problems:
        for rank, local, host, _ in heads:
            if local == 0 and (text := _await(probe / f"from-host-of-{rank}", token, seconds)):
                problems.append(f"rank 0 does not see what {host} wrote: {text}")
    problems = world.broadcast(problems)
    if world.main:
        shutil.rmtree(probe, ignore_errors=True)
    fix = "run.dir must be on a file system all nodes share (NFS, Lustre, ...)"
    return [Problem(f"run.dir {directory}: {text}", fix, fatal=True) for text in problems]


def _put(path: Path, token: str) -> None:
    files.write_text(path, token * 200)


def _await(path: Path, token: str, seconds: float) -> str:
    """Empty once the file is there and whole; else what is wrong with it."""
    until = time.monotonic() + seconds
    while True:
        try:
            if path.read_text() == token * 200:
                return ""
            problem = f"{path.name} was seen before it was whole: renames are not atomic here"
        except FileNotFoundError:
            problem = f"a file another host wrote did not appear within {seconds:g} s"
        except OSError as error:
            problem = str(error)
        if time.monotonic() > until:
            return problem
        time.sleep(0.05)


def quick(config: TrainConfig, world: World) -> None:
    """The checks that cost nothing, at the start of every run.

    Raises:
        UserError: versions, code, configuration or data differ, or run.dir is not shared.
    """
    if world.size == 1:
        return
    problems = differences(collect(config, world))
    problems += shared_directory(Path(config.run.dir), world)
    if world.main:
        for problem in problems:
            if not problem.fatal:
                print(f"warning: {problem}", file=sys.stderr, flush=True)
    fatal = [str(problem) for problem in problems if problem.fatal]
    if fatal:
        raise UserError(fatal[0])
