"""Starts the ranks through ``deepspeed``, watches them, restarts them, and believes only DONE.

DeepSpeed's launcher alone loses things: SIGTERM kills it and leaves its ranks running, and when
its per-node part is killed it exits 0. So the ranks live in a session of their own, signals go
to them directly, whatever is left of the session is ended, and success is the file ``DONE`` in
the run directory.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from l2vit import cli
from l2vit.launch import command, processes
from l2vit.train import run_dir
from l2vit.train.guards import STOPPED

WRONG_CONFIGURATION = 2
DEATH_GRACE = 60.0
"""Seconds the other ranks have to end by themselves once one has died."""
POLL = 0.25
LONGEST_PAUSE = 600.0
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def launch(options: argparse.Namespace) -> int:
    """Start the job that :func:`command.parse` read and watch it; returns the exit status."""
    job = command.build(options)
    supervisor = Supervisor(
        run_dir=Path(job.config.run.dir),
        length=(job.config.schedule.length, job.config.schedule.cooldown),
        max_restarts=options.max_restarts,
        backoff=options.backoff,
        stop_grace=options.stop_grace,
        remote=job.remote,
    )
    if options.preflight:
        return supervisor.run_once(job.argv, job.environment)
    return supervisor.run(job.argv, job.environment)


@dataclass
class Supervisor:
    """Runs one job to its end, however often its ranks have to be started."""

    run_dir: Path
    length: tuple[str, str]
    """``schedule.length`` and ``schedule.cooldown``: what ``DONE`` must speak of."""
    max_restarts: int = 0
    backoff: float = 10.0
    """Seconds before the first restart; doubled each time, at most ``LONGEST_PAUSE``."""
    stop_grace: float = 300.0
    """Seconds a signalled job has to save before it is killed."""
    remote: bool = False
    """Ranks on other hosts through ssh: signals go to ``deepspeed``, which passes them on."""
    _signals: list[int] = field(default_factory=list)
    _saved_before: int = 0
    """Step of the last complete checkpoint when the signal came."""

    def run(self, argv: Sequence[str], environment: dict[str, str]) -> int:
        """Start the ranks until the run is done, stopped, or not worth another start.

        Returns:
            0 when ``DONE`` is there, 2 for a wrong configuration, 75 when a signal stopped the
            run and it can be continued, otherwise 1.
        """
        for number in _FORWARDED:
            signal.signal(number, self._on_signal)
        failures: list[run_dir.Reached] = []
        for attempt in range(self.max_restarts + 1):
            status = self._attempt(argv, environment)
            if status in (0, STOPPED, WRONG_CONFIGURATION):
                return status
            failures.append(run_dir.reached(self.run_dir))
            if attempt == self.max_restarts or self._signals:
                break
            if why := hopeless(failures):
                self._say(f"{why}; not restarting")
                return 1
            pause = min(self.backoff * 2**attempt, LONGEST_PAUSE)
            again = f"restart {attempt + 1} of {self.max_restarts} in {pause:g} s"
            self._say(f"failed at {failures[-1]}; {again}")
            if not self._pause(pause):
                return STOPPED
        return 1

    def run_once(self, argv: Sequence[str], environment: dict[str, str]) -> int:
        """Start the ranks for something that is not a run (preflight); its status counts."""
        for number in _FORWARDED:
            signal.signal(number, self._on_signal)
        return 0 if self._start(argv, environment) == 0 else 1

    def _attempt(self, argv: Sequence[str], environment: dict[str, str]) -> int:
        status = self._start(argv, environment)
        if status == WRONG_CONFIGURATION:
            return status
        if run_dir.finished(self.run_dir, self.length):
            return 0
        if self._signals:
            return self._stopped_status(status)
        if status == STOPPED:  # another node's supervisor was signalled, and the ranks agreed
            return STOPPED
        if status == 0:
            self._say(
                f"the launcher reports success but {self.run_dir / run_dir.DONE_NAME} is missing"
            )
        else:
            self._say(f"the ranks ended with status {status}; the first error above says why")
        return 1

    def _stopped_status(self, status: int) -> int:
        """After a signal: 75 if the run can be continued with nothing lost that was promised."""
        by_signal = status <= 0 or status > 128
        if status == STOPPED or run_dir.reached(self.run_dir).saved > self._saved_before:
            return STOPPED
        if by_signal:  # before the ranks were ready to catch it: nothing to save yet
            self._say("stopped before training began; nothing was saved")
            return STOPPED
        self._say(f"stopped by a signal, but the ranks failed to save (status {status})")
        return 1

    def _start(self, argv: Sequence[str], environment: dict[str, str]) -> int:
        process = subprocess.Popen(argv, env=environment, start_new_session=True)
        session = process.pid
        try:
            return self._watch(process, session)
        finally:
            left = processes.end_session(session, grace=5.0)
            if held := processes.members(session):
                pids = ", ".join(str(process.pid) for process in held)
                self._say(f"cannot end process {pids}: it waits for a disk or device (ps: state D)")
            elif left:
                self._say(f"ended {left} process(es) the launcher had left behind")

    def _watch(self, process: subprocess.Popen[bytes], session: int) -> int:
        forwarded, most_ranks, deadline = 0, 0, float("inf")
        while process.poll() is None:
            now = time.monotonic()
            if len(self._signals) > forwarded:
                first = forwarded == 0
                forwarded = len(self._signals)
                self._forward(process, session)
                deadline = min(deadline, now + (self.stop_grace if first else 5.0))
            alive = len(processes.ranks(session))
            most_ranks = max(most_ranks, alive)
            if 0 < alive < most_ranks:
                deadline = min(deadline, now + DEATH_GRACE)
            if now > deadline:
                self._say("the ranks did not end in time; killing them")
                processes.end_session(session, grace=0.0)
                break
            time.sleep(POLL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(processes.KILLED)
        return 1

    def _forward(self, process: subprocess.Popen[bytes], session: int) -> None:
        number = self._signals[-1]
        self._saved_before = run_dir.reached(self.run_dir).saved
        self._say(f"{signal.Signals(number).name} received; passing it to the ranks")
        pids = [] if self.remote else processes.ranks(session)
        if pids:
            processes.send(pids, signal.SIGTERM)
        elif self.remote:
            process.send_signal(signal.SIGTERM)
        else:  # still starting: there is nothing to save
            processes.end_session(session, grace=5.0)

    def _pause(self, seconds: float) -> bool:
        """Sleep; False when a signal came instead."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._signals:
            time.sleep(min(POLL, seconds))
        return not self._signals

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _say(self, message: str) -> None:
        cli.tell(f"[launch] {message}", error=True)


def hopeless(failures: Sequence[run_dir.Reached]) -> str:
    """Why another start would only repeat the last ones; empty if it may help."""
    if len(failures) >= 2 and failures[-1].step == failures[-2].step:
        return f"failed twice at step {failures[-1].step}: no passing fault"
    if len(failures) >= 3 and failures[-1].saved == failures[-3].saved:
        return f"failed three times without a checkpoint after step {failures[-1].saved}"
    return ""
