"""``python -m l2vit.launch.requeue``: whether a Slurm job that ended is queued again.

The supervisor's judgement, kept over the job's starts in ``launch.json`` in the run directory: a
warned job is queued again, a failed one as long as it gets on, a finished, wrong or cancelled one
never.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from l2vit import cli, files
from l2vit.errors import UserError
from l2vit.launch import command
from l2vit.launch.supervisor import hopeless, last_record
from l2vit.train import run_dir
from l2vit.train.guards import STOPPED
from l2vit.train.rendezvous import UnreachablePeers
from l2vit.train.run_dir import Reached

MEMORY = "launch.json"
MAX_RESTARTS = 20
GIVE_UP_AFTER = 86400.0
_GOING = ("RUNNING",)
"""States of a job that nobody cancelled, ended or preempted."""


@dataclass
class History:
    """What earlier starts of the job left: the failures, and since when peers were not reached."""

    job: str
    failures: list[Reached] = field(default_factory=list)
    unreached_since: float = 0.0
    record: int = 0
    """``last_record`` after the last start."""


def main(argv: Sequence[str]) -> int:
    """Judge the start that ended and queue the job again, or say why not."""
    return cli.run(lambda: _main(argv), program="requeue")


def _main(argv: Sequence[str]) -> int:
    parser = cli.parser("python -m l2vit.launch.requeue", "Queue a Slurm job again, or not.")
    parser.add_argument("--status", type=int, required=True, help="of srun")
    parser.add_argument("--warned", type=int, required=True, help="1: Slurm announced its end")
    options, (_, *rest) = parser.parse_known_args(argv)
    settings = command.read_config(rest)
    job, directory = os.environ["SLURM_JOB_ID"], Path(settings.run.dir)
    length = (settings.schedule.length, settings.schedule.cooldown)
    if run_dir.finished(directory, length) or options.status == 2:
        return 0
    if (state := job_state(job)) not in _GOING:
        print(f"job {job} is {state}: not queued again")
        return 0
    history = read(directory, job)
    why = reason_to_end(history, directory, options.status, warned=bool(options.warned))
    directory.mkdir(parents=True, exist_ok=True)  # a warning may come before any rank was up
    files.write_json(directory / MEMORY, asdict(history))
    if why:
        print(f"{why}; not queued again")
        return 0
    print(
        f"ended with status {options.status} at {run_dir.reached(directory)}: queueing {job} again"
    )
    return subprocess.run(["scontrol", "requeue", job]).returncode


def reason_to_end(history: History, directory: Path, status: int, *, warned: bool) -> str:
    """Why the job is not to be queued again; empty if it is. Brings ``history`` up to date."""
    record = last_record(directory)
    trained, history.record = record != history.record, record
    if warned or status == STOPPED:
        history.unreached_since = 0.0
        return ""
    if status == UnreachablePeers.exit_status and not trained:
        history.unreached_since = history.unreached_since or time.time()
        tried = time.time() - history.unreached_since
        return f"no peers for {tried:.0f} s" if tried > GIVE_UP_AFTER else ""
    history.unreached_since = 0.0
    history.failures.append(run_dir.reached(directory))
    if len(history.failures) > MAX_RESTARTS:
        return f"failed {len(history.failures)} times"
    return hopeless(history.failures)


def read(directory: Path, job: str) -> History:
    """What earlier starts of this very job left; a fresh one otherwise."""
    try:
        found: dict[str, Any] = json.loads((directory / MEMORY).read_text())
        failures = [Reached(**reached) for reached in found.pop("failures")]
        history = History(**found, failures=failures)
    except (OSError, ValueError, TypeError, KeyError):
        return History(job)
    return history if history.job == job else History(job)


def job_state(job: str) -> str:
    """The state Slurm gives the job, such as RUNNING or CANCELLED."""
    shown = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True
    )
    for word in shown.stdout.split():
        name, _, value = word.partition("=")
        if name == "JobState":
            return value
    raise UserError(f"scontrol does not know job {job}: {shown.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
