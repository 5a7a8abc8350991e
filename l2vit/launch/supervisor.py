"""Starts the ranks, watches them, starts them again after a failure, and believes only DONE.

A run is finished when the file ``DONE`` in its directory says so, whatever a process's exit
status. What counts as a failure and what is only a start that could not reach its peers (a node
or link that is down) is decided here, and how long to go on trying.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from l2vit import cli
from l2vit.launch import command, job
from l2vit.launch.attempt import UNREACHABLE, WRONG_CONFIGURATION, Attempt, Outcome
from l2vit.launch.job import Job
from l2vit.train import metrics, run_dir, run_lock
from l2vit.train.guards import STOPPED
from l2vit.train.run_dir import Reached

POLL = 0.25
LONGEST_PAUSE = 600.0
LONGEST_RETRY = 300.0
"""Between starts that cannot reach their peers; ranks wait longer than this for one another, so
that two nodes that retry on their own meet."""
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def launch(options: argparse.Namespace) -> int:
    """Start the job that :func:`command.parse` read and watch it; returns the exit status."""
    settings = command.read_config(options.rest)
    if not options.preflight:
        run_lock.refuse_if_held(Path(settings.run.dir))
    supervisor = Supervisor(
        run_dir=Path(settings.run.dir),
        length=(settings.schedule.length, settings.schedule.cooldown),
        max_restarts=options.max_restarts,
        backoff=options.backoff,
        stop_grace=options.stop_grace,
        give_up_after=options.give_up_after,
    )
    started = job.build(options, settings)
    if options.preflight:
        return supervisor.run_once(started)
    command.check_ranks(options.rest, started.world_size)
    return supervisor.run(started)


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
    give_up_after: float = 86400.0
    """Seconds to go on with starts that cannot reach their peers."""
    _signals: list[int] = field(default_factory=list)
    _saved_before: int = 0
    """Step of the last complete checkpoint when the signal came."""
    _retries: int = 0
    """Starts in a row that could not reach their peers."""
    _first_retry: float = 0.0

    def run(self, wanted: Job) -> int:
        """Start the ranks until the run is done, stopped, or not worth another start.

        Returns:
            0 when ``DONE`` is there, 2 for a wrong configuration, 75 when a signal stopped the
            run and it can be continued, otherwise 1.
        """
        self._listen_to_signals()
        failures: list[Reached] = []
        while True:
            trained_before = last_record(self.run_dir)
            outcome = self._start(wanted)
            trained = last_record(self.run_dir) != trained_before
            status = self._judged(outcome)
            if status in (0, STOPPED, WRONG_CONFIGURATION):
                return status
            if self._signals:
                return 1
            if status == UNREACHABLE and not trained:
                pause = self._retry_in(outcome, started_before=bool(failures))
            else:
                self._retries = 0
                failures.append(run_dir.reached(self.run_dir))
                pause = self._restart_in(failures)
            if pause is None:
                return 1
            if not self._pause(pause):
                return STOPPED

    def run_once(self, wanted: Job) -> int:
        """Start the ranks for something that is not a run (preflight); its status counts."""
        self._listen_to_signals()
        outcome = self._start(wanted)
        if outcome.why:
            self._say(outcome.why)
        return 0 if outcome.status == 0 else 1

    def _start(self, wanted: Job) -> Outcome:
        attempt = Attempt(wanted, self._signals, self.stop_grace, self._say, self._note_saved)
        return attempt.run()

    def _judged(self, outcome: Outcome) -> int:
        """The status this start leaves the run with; says what is wrong."""
        status = outcome.status
        if status == WRONG_CONFIGURATION:
            return status
        if run_dir.finished(self.run_dir, self.length):
            return 0
        if self._signals:
            return self._stopped_status(outcome)
        if status == STOPPED:  # another node's supervisor was signalled, and the ranks agreed
            return STOPPED
        if status == 0:
            self._say(f"the ranks report success but {self.run_dir / run_dir.DONE_NAME} is missing")
        elif status != UNREACHABLE:
            self._say(f"{outcome.why}; the first error above says why")
        return UNREACHABLE if status == UNREACHABLE else 1

    def _stopped_status(self, outcome: Outcome) -> int:
        """After a signal: 75 if the run can be continued with nothing lost that was promised."""
        status = outcome.status
        if status == STOPPED or run_dir.reached(self.run_dir).saved > self._saved_before:
            return STOPPED
        if status <= 0 or status == UNREACHABLE:  # before the ranks were ready to catch it
            self._say("stopped before training began; nothing was saved")
            return STOPPED
        self._say(f"stopped by a signal, but the ranks failed to save ({outcome.why})")
        return 1

    def _retry_in(self, outcome: Outcome, *, started_before: bool) -> float | None:
        """Seconds until a start that could not reach its peers is tried again; None: give up."""
        if outcome.refused and not started_before and self._retries == 0:
            self._say(f"{outcome.why}; mend this and start again")
            return None
        now = time.monotonic()
        if self._retries == 0:
            self._first_retry = now
        pause = min(self.backoff * 2 ** min(self._retries, 16), LONGEST_RETRY)
        self._retries += 1
        spent = now - self._first_retry
        if spent + pause > self.give_up_after:
            self._say(f"{outcome.why}; giving up after {spent:.0f} s of trying (--give-up-after)")
            return None
        self._say(f"{outcome.why}; no failure of the run: trying again in {pause:g} s")
        return pause

    def _restart_in(self, failures: Sequence[Reached]) -> float | None:
        """Seconds until a failed run is started again; None: it is not."""
        if len(failures) > self.max_restarts:
            return None
        if why := hopeless(failures):
            self._say(f"{why}; not restarting")
            return None
        pause = min(self.backoff * 2 ** (len(failures) - 1), LONGEST_PAUSE)
        again = f"restart {len(failures)} of {self.max_restarts} in {pause:g} s"
        self._say(f"failed at {failures[-1]}; {again}")
        return pause

    def _note_saved(self) -> None:
        self._saved_before = run_dir.reached(self.run_dir).saved

    def _pause(self, seconds: float) -> bool:
        """Sleep; False when a signal came instead."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._signals:
            time.sleep(min(POLL, seconds))
        return not self._signals

    def _listen_to_signals(self) -> None:
        for number in _FORWARDED:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _say(self, message: str) -> None:
        cli.tell(f"[launch] {message}", error=True)


def last_record(directory: Path) -> int:
    """A number that changes whenever the run records something: it has begun to train."""
    try:
        return (directory / metrics.JSONL).stat().st_mtime_ns
    except OSError:
        return 0


def hopeless(failures: Sequence[run_dir.Reached]) -> str:
    """Why another start would only repeat the last ones; empty if it may help."""
    if len(failures) >= 2 and failures[-1].step == failures[-2].step:
        return f"failed twice at step {failures[-1].step}: no passing fault"
    if len(failures) >= 3 and failures[-1].saved == failures[-3].saved:
        return f"failed three times without a checkpoint after step {failures[-1].saved}"
    return ""
