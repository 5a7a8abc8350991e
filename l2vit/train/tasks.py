"""Which task, and which class of settings, the key ``task`` of a configuration names.

A new task is one more entry here. Entries import what they name when they are asked for, so that
nobody pays for a task that is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2vit import config
from l2vit.errors import ConfigError
from l2vit.train.config import TrainConfig

if TYPE_CHECKING:  # torch: reading a configuration needs none
    from l2vit.train.task import Task

DEFAULT = "classify"


@dataclass(frozen=True)
class Kind:
    """What the key ``task`` stands for."""

    settings: Callable[[], type[TrainConfig]]
    """The class of its settings."""
    make: Callable[[Any], Task[Any]]
    """The task from its settings."""


def _classification(settings: TrainConfig) -> Task[Any]:
    from l2vit.train.classification import Classification

    return Classification(settings)


def _detection_settings() -> type[TrainConfig]:
    from l2vit.train.dense_config import DetectConfig

    return DetectConfig


def _detection(settings: Any) -> Task[Any]:
    from l2vit.train.detection import Detection

    return Detection(settings)


def _segmentation_settings() -> type[TrainConfig]:
    from l2vit.train.dense_config import SegmentConfig

    return SegmentConfig


def _segmentation(settings: Any) -> Task[Any]:
    from l2vit.train.segmentation import Segmentation

    return Segmentation(settings)


_KINDS = {
    DEFAULT: Kind(lambda: TrainConfig, _classification),
    "detect": Kind(_detection_settings, _detection),
    "segment": Kind(_segmentation_settings, _segmentation),
}


def names() -> tuple[str, ...]:
    """The tasks there are."""
    return tuple(_KINDS)


def kind(name: str) -> Kind:
    """The task called ``name``.

    Raises:
        ConfigError: there is none.
    """
    if name not in _KINDS:
        raise ConfigError(f"task: {name!r} is not one of {', '.join(sorted(_KINDS))}", key="task")
    return _KINDS[name]


def load_classification(
    path: Path | str, overrides: Sequence[str] = (), *, program: str
) -> TrainConfig:
    """Read a configuration for a program that knows classification only.

    Raises:
        ConfigError: another task, or anything :func:`load_config` refuses.
    """
    settings = load_config(path, overrides)
    if settings.task != DEFAULT:
        error = ConfigError(
            f"task: {settings.task}; {program} reads recipes of task {DEFAULT} only", key="task"
        )
        raise config.blamed(error, path, overrides)
    return settings


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration file as the settings of the task it names.

    Raises:
        ConfigError: names the file, the key and what it should be.
    """
    tree = config.read_tree(Path(path))
    for override in overrides:
        if override.startswith("task="):
            tree["task"] = override.partition("=")[2]
    try:
        found = kind(str(tree.get("task", DEFAULT)))
    except ConfigError as error:
        raise config.blamed(error, path, overrides) from None
    return config.load(found.settings(), path, overrides)
