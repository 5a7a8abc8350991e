"""The run directory: what lies in it, and whether the run in it may go on or is finished."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2vit import files
from l2vit.config import dump, read_tree, to_tree
from l2vit.errors import ConfigError, UserError
from l2vit.train import checkpoint, metrics
from l2vit.train.checkpoint import Reader
from l2vit.train.config import ScheduleConfig, TrainConfig
from l2vit.train.distributed import World
from l2vit.train.mirror import Mirror
from l2vit.train.state import TrainState

CONFIG_NAME = "config.yaml"
DONE_NAME = "DONE"
_FIXED = ("model.name", "model.window_size", "model.args.", "run.seed", "schedule.global_batch")
_FREE = ("run.dir", "run.draws", "about.")


# -- beginning and end


def prepare(config: TrainConfig, world: World) -> Path:
    """Make the directory, write ``config.yaml`` and clear away what a kill left half written.

    Raises:
        UserError: it cannot be written, or holds a run that this configuration cannot continue.
    """
    directory = Path(config.run.dir)
    problem: UserError | None = None
    if world.main:
        try:
            _prepare(directory, config)
        except OSError as error:
            problem = UserError(f"run.dir: cannot write to {directory}: {error.strerror}")
        except UserError as error:
            problem = error
    world.raise_on_all_ranks(problem)
    return directory


def _prepare(directory: Path, config: TrainConfig) -> None:
    (directory / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
    _set_damaged_aside(directory)
    if (directory / DONE_NAME).is_file() or checkpoint.complete_steps(directory):
        for change in changed_settings(directory / CONFIG_NAME, config):
            print(f"continuing with another setting: {change}", flush=True)
    files.write_text(directory / CONFIG_NAME, dump(config))
    for step in checkpoint.torn_steps(directory):
        print(
            f"warning: the save of step {step} was interrupted; deleting its remains",
            file=sys.stderr,
        )
        checkpoint.remove(checkpoint.step_directory(directory, step))
    for path in checkpoint.strange(directory):
        aside = files.set_aside(path)
        print(f"warning: {path} is no checkpoint; kept as {aside.name}", file=sys.stderr)
    if config.checkpoint.mirror and not checkpoint.complete_steps(directory):
        found = Mirror(config.checkpoint.mirror).fetch_newest(directory)
        if found is not None:
            print(f"fetched step {found} from {config.checkpoint.mirror}", flush=True)


def _set_damaged_aside(directory: Path) -> None:
    """Rename a configuration or a DONE that nobody can have meant: the checkpoints count."""
    for name, sound in ((CONFIG_NAME, _is_configuration), (DONE_NAME, _is_done)):
        path = directory / name
        if path.is_file() and not sound(path):
            aside = files.set_aside(path)
            print(f"warning: {path} is damaged; kept as {aside.name}", file=sys.stderr, flush=True)


def _is_configuration(path: Path) -> bool:
    try:
        return {"run", "model", "schedule"} <= read_tree(path).keys()
    except ConfigError:
        return False


def _is_done(path: Path) -> bool:
    try:
        return "length" in files.read_json(path, what="completion marker")
    except (UserError, TypeError):
        return False


def finished(directory: Path, length: Sequence[str]) -> bool:
    """True if ``DONE`` says that the run reached ``length`` (see `length_of`).

    A finished run may be made longer: then an old ``DONE`` proves nothing. Neither does one that
    cannot be read.
    """
    try:
        done = files.read_json(directory / DONE_NAME, what="completion marker")
        return bool(done["length"] == list(length))
    except (UserError, KeyError, TypeError):
        return False


def write_done(directory: Path, state: TrainState, schedule: ScheduleConfig) -> None:
    """Mark the run as finished."""
    done = {
        "step": state.step,
        "images_seen": state.images_seen,
        "length": length_of(schedule),
        "metrics": state.metrics,
    }
    files.write_json(directory / DONE_NAME, done)


def length_of(schedule: ScheduleConfig) -> list[str]:
    """What ``DONE`` says the run was to be: ``schedule.length`` and ``schedule.cooldown``."""
    return [schedule.length, schedule.cooldown]


@dataclasses.dataclass(frozen=True)
class Reached:
    """The last step recorded and the last step saved; 0 where there is none."""

    step: int
    saved: int

    def __str__(self) -> str:
        return f"step {self.step} (last complete checkpoint: step {self.saved})"


def reached(directory: Path) -> Reached:
    """How far the run has come; zeros for a run that has not begun."""
    saved = max(checkpoint.complete_steps(directory), default=0)
    recorded = (int(record["step"]) for record in metrics.read(directory / metrics.JSONL))
    return Reached(step=max(recorded, default=saved), saved=saved)


# -- continuing


def changed_settings(saved: Path, config: TrainConfig) -> list[str]:
    """``key: then -> now`` of each setting that differs from the ``saved`` configuration.

    Raises:
        ConfigError: one that a run cannot change on its way differs; names it.
    """
    if not saved.is_file():
        return []
    then, now = _flat(read_tree(saved)), _flat(to_tree(config))
    then = _defaults(config) | then  # keys that are younger than the run
    changed = [
        key
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(_FREE)
    ]
    for key in changed:
        if key.startswith(_FIXED):
            raise ConfigError(
                f"{key}: {saved.parent} holds a run with {then.get(key)}, the configuration says"
                f" {now.get(key)}; continue with the same value or use a fresh run.dir"
            )
    return [f"{key}: {then.get(key)} -> {now.get(key)}" for key in changed]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _defaults(section: Any, prefix: str = "") -> dict[str, Any]:
    """The default of every key that has one."""
    found: dict[str, Any] = {}
    for each in dataclasses.fields(section):
        value = getattr(section, each.name)
        if dataclasses.is_dataclass(value):
            found |= _defaults(value, f"{prefix}{each.name}.")
        elif each.default is not dataclasses.MISSING:
            default = list(each.default) if isinstance(each.default, tuple) else each.default
            found[prefix + each.name] = default
    return found


def newest_sound(directory: Path, world: World) -> Reader | None:
    """The run's newest checkpoint whose hashes fit; damaged ones are renamed and reported.

    The ranks share the hashing among themselves.
    """
    while steps := world.broadcast(checkpoint.complete_steps(directory)):
        path = checkpoint.step_directory(directory, steps[-1])
        reader: Reader | None = None
        try:
            reader = Reader(path)
            problem = verified(reader, world)
        except UserError as error:
            problem = error
        problems = [text for text in world.gather(str(problem or "")) if text]
        if not problems:
            return reader
        if world.main:
            aside = files.set_aside(path)
            before = f"step {steps[-2]}" if len(steps) > 1 else "the beginning"
            print(
                f"warning: {problems[0]}; kept as {aside.name}; continuing from {before}",
                file=sys.stderr,
                flush=True,
            )
        world.barrier()
    return None


def verified(reader: Reader, world: World) -> UserError | None:
    """What is wrong with this rank's share of the checkpoint's files."""
    try:
        reader.verify(world.rank, world.size)
    except UserError as error:
        return error
    return None
