"""Weights & Biases, MLflow and trackio: ``log.sinks`` beside metrics.jsonl and TensorBoard.

Each has a thread of its own on rank 0, which opens the run and sends: training neither waits for
it nor ends with it. Where to and with which credentials is the client's own
business (its environment variables and files); this project has no key for them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from l2vit import cli, files
from l2vit.errors import ConfigError

ID_NAME = "logger_id"
"""File in the run directory: by this id a restart continues the run in every logger."""
TENSORBOARD = "tensorboard"
QUEUE = 10_000
"""Records that wait for a slow service; further ones are left out."""
RETRY = 300.0
"""Seconds between two attempts to open a run with a service that failed."""
CLOSING = 60.0
"""Seconds at the end to send what is left."""
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@")


class Client(Protocol):
    """What one service does with a run's records."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one record."""

    def close(self) -> None:
        """Send what is left and end."""


def require(names: Sequence[str]) -> None:
    """Refuse loggers whose package is not installed.

    Raises:
        ConfigError: names the package and how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            extra = "train" if name == TENSORBOARD else "loggers"
            raise ConfigError(
                f"log.sinks: {name} is not installed: pip install 'l2vit[{extra}]'", key="log.sinks"
            )


def has_password(text: str) -> bool:
    """True for an address with ``user:password@`` in it."""
    return _PASSWORD.search(text) is not None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float]:
    """Dotted keys and plain values of a configuration."""
    found: dict[str, str | int | float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str | int | float) else str(value)
    return found


def start(names: Sequence[str], run: Path, settings: Mapping[str, Any]) -> list[Background]:
    """Begin to log to the services ``names``; those that are not ours (TensorBoard) are skipped.

    Args:
        names: ``log.sinks``.
        run: the run directory.
        settings: the whole configuration as a tree.
    """
    wanted = [name for name in names if name in _CLIENTS]
    if not wanted:
        return []
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    for name in wanted:  # now: a process that forks while a thread imports may hang
        with contextlib.suppress(Exception):  # its thread will meet it again, and tell
            importlib.import_module(name)
    identity = _identity(run)
    project = str(settings["log"]["project"])
    values = flat(settings)
    return [
        Background(name, lambda kind=_CLIENTS[name]: kind(run, identity, project, values))  # type: ignore[misc]
        for name in wanted
    ]


def _identity(run: Path) -> str:
    path = run / ID_NAME
    known = path.read_text().strip() if path.is_file() else ""
    if not re.fullmatch(r"[0-9a-f]{12}", known):
        known = secrets.token_hex(6)
        files.write_text(path, known + "\n")
    return known


class Background:
    """One service's records, sent by a thread; a failure is told once and never raised."""

    def __init__(self, name: str, connect: Callable[[], Client]) -> None:
        self.name = name
        self._connect = connect
        self._client: Client | None = None
        self._try_at = 0.0
        self._told = False
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._work, name=f"log-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over one record; returns at once."""
        try:
            self._waiting.put_nowait((step, dict(values)))
        except queue.Full:
            self._warn(f"{QUEUE:,} records wait for it; the next ones are left out")

    def close(self) -> None:
        """Give it some time to send what is left."""
        try:
            self._waiting.put(None, timeout=1.0)
        except queue.Full:
            return
        self._thread.join(CLOSING)
        if self._thread.is_alive():
            self._warn(f"not done after {CLOSING:g} s; its last records may be missing")

    def _work(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._guarded(lambda record=record: self._send(*record))  # type: ignore[misc]
        if self._client is not None:
            self._guarded(self._client.close)

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        if self._client is None:
            if time.monotonic() < self._try_at:
                return
            self._try_at = time.monotonic() + RETRY
            self._client = self._connect()
        self._client.log(step, values)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._warn(_PASSWORD.sub("://***@", lines[0]))

    def _warn(self, problem: str) -> None:
        if not self._told:
            self._told = True
            cli.tell(f"warning: {self.name}: {problem}; training goes on", error=True)


# -- the clients


class _Wandb:
    """Records with their step as a value: a run that goes back to a checkpoint may log it again."""

    def __init__(self, run: Path, identity: str, project: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", project),
            id=identity,
            name=os.environ.get("WANDB_NAME", run.name),
            resume="allow",
            dir=str(run),
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True, save_code=False),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """Finds its run by a tag; without MLFLOW_TRACKING_URI, files in the run directory."""

    def __init__(self, run: Path, identity: str, project: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI") or (run.absolute() / "mlruns").as_uri()
        self._client = MlflowClient(tracking_uri=where)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", project)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        found = self._client.search_runs([experiment], f"tags.l2vit_id = '{identity}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"l2vit_id": identity}
        self._id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._id, re.sub(r"[^\w./ -]", "_", key), str(value)[:500])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(re.sub(r"[^\w./ -]", "_", k), v, now, step) for k, v in values.items()]
        self._client.log_batch(self._id, metrics=batch)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Trackio:
    """Runs are known by their names here: the id makes ours unique."""

    def __init__(self, run: Path, identity: str, project: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=project,
            name=f"{run.name}-{identity}",
            resume="allow",
            config=dict(settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_CLIENTS: dict[str, Callable[[Path, str, str, Mapping[str, Any]], Client]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}
