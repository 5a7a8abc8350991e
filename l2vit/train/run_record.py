"""What a run directory says about its run, in whatever state it is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from l2vit.config import read_tree
from l2vit.errors import ConfigError
from l2vit.train import history
from l2vit.train.metrics import JSONL, clock, read

PLAN_NAME = "plan.json"
"""What ``python -m pretrain plan --json`` predicted, for the report."""


@dataclass
class RunRecord:
    """A run as its files have it; empty where there are none."""

    name: str
    finished: bool = False
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    plan: dict[str, Any] = field(default_factory=dict, repr=False)
    directory: Path | None = None

    @classmethod
    def load(cls, run: Path, name: str = "") -> RunRecord:
        """Read the directory; files that are missing or damaged count as empty."""
        config = _config(run)
        return cls(
            name=name or run.resolve().name,
            finished=_finished(run, config),
            records=read(run / JSONL),
            history=history.read(run),
            config=config,
            plan=_json(run / PLAN_NAME),
            directory=run,
        )

    @cached_property
    def start(self) -> dict[str, Any]:
        """The facts of the newest start; empty for a run made before they were kept."""
        return next((e for e in reversed(self.history) if e["event"] == "start"), {})

    @property
    def headline(self) -> str:
        """The end of the figure that says how good the model is."""
        return str(self.start.get("headline") or "/top1_percent")

    @property
    def headlines(self) -> list[str]:
        """The keys of those figures, the main set's first."""
        keys = {k for record in self.records for k in record if k.endswith(self.headline)}
        return sorted(keys, key=lambda key: (not key.startswith("val"), key))

    @property
    def per_epoch(self) -> float:
        """Steps of an epoch; 0 where that is not known."""
        found = self.start.get("steps_per_epoch", 0)
        return float(found) if type(found) in (int, float) and found > 0 else 0.0

    def setting(self, key: str) -> Any:
        """The value of a dotted key in the run's configuration; None if it is not there."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def last(self, key: str) -> Any:
        """The newest value of ``key``; None if there is none."""
        return next((r[key] for r in reversed(self.records) if key in r), None)

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every record that has a finite ``key``."""
        found = [(float(r["step"]), float(r[key])) for r in self.records if key in r]
        return [point for point in found if math.isfinite(point[1])]

    def as_dict(self, now: float) -> dict[str, Any]:
        """The row of the table of runs, as values for programs."""
        written = self.last("time")
        return {
            "run": self.name,
            "state": "finished" if self.finished else "not finished",
            "step": self.last("step") or 0,
            "seconds_left": 0.0 if self.finished else self.last("seconds_left"),
            "seconds_since_record": None if written is None else max(0.0, now - written),
            "loss": self.last("loss"),
            self.headline.strip("/"): {
                k.removesuffix(self.headline): self.last(k) for k in self.headlines
            },
            "images_per_second": self.last("images_per_second"),
        }

    def row(self, now: float | None = None) -> tuple[str, ...]:
        """The row of the table of runs, for people."""
        found = self.as_dict(time.time() if now is None else now)
        unit = "%" if self.headline.endswith("_percent") else ""
        values = found[self.headline.strip("/")].items()
        accuracy = ", ".join(f"{k} {v:.2f}{unit}" for k, v in values)
        left, age = found["seconds_left"], found["seconds_since_record"]
        return (
            self.name,
            found["state"],
            f"{found['step']:,}",
            "-" if not left else clock(left),
            "-" if age is None else f"{clock(age)} ago",
            _number(found["loss"], ".4f"),
            accuracy or "-",
            _number(found["images_per_second"], ",.1f"),
        )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _config(run: Path) -> dict[str, Any]:
    try:
        return read_tree(run / "config.yaml")
    except (OSError, ValueError, ConfigError):
        return {}


def _finished(run: Path, config: Mapping[str, Any]) -> bool:
    """``DONE`` is there and speaks of the length that the configuration has now."""
    try:
        schedule = config["schedule"]
        wanted = [schedule["length"], schedule.get("cooldown", "0 epochs")]
        return bool(_json(run / "DONE")["length"] == wanted)
    except (KeyError, TypeError, AttributeError):
        return False


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
