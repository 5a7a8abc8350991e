"""What can be known to be wrong with a run before any rank of it is started.

The ranks would find the same, after seconds or minutes of starting. Cheap questions come first;
torch and timm are imported only for the last one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from l2vit.config import to_tree
from l2vit.data.manifest import MANIFEST_NAME, Manifest
from l2vit.data.storage import is_remote
from l2vit.errors import ConfigError, UserError
from l2vit.train import loggers, tasks
from l2vit.train.config import TrainConfig


def check(settings: TrainConfig) -> None:
    """Refuse data, durations, first weights and models that cannot work.

    Raises:
        ConfigError: a setting; the message begins with its whole key.
        UserError: shards that are damaged or not there.
    """
    can_be_logged(settings)
    if settings.task == tasks.DEFAULT:
        manifest = _training_data(settings)
        _steps(settings, manifest)
        _evaluation_data(settings, manifest)
    _first_weights(settings)
    _network(settings)


def can_be_logged(settings: TrainConfig) -> None:
    """Refuse loggers that are not installed, and passwords that ``config.yaml`` would show.

    Raises:
        ConfigError: names the key and the fix.
    """
    loggers.require(settings.log.sinks)
    for key, value in loggers.flat(to_tree(settings)).items():
        if loggers.has_password(str(value)):
            raise ConfigError(
                f"{key}: an address with a password would be written to config.yaml and shown by"
                " loggers; give credentials through the environment or the client's own files",
                key=key,
            )


def check_ranks(settings: TrainConfig, ranks: int) -> None:
    """Refuse a global batch that ``ranks`` ranks cannot share in micro-batches.

    Raises:
        ConfigError: names the nearest batch or the micro-batches that can be.
    """
    from l2vit.data.order import split

    with _keys_named():
        split(
            settings.schedule.global_batch,
            world=ranks,
            micro_batch=settings.engine.micro_batch,
            multiple_of=tasks.kind(settings.task).make(settings).batch_multiple,
        )


def require_first_weights(settings: TrainConfig) -> None:
    """Refuse fine-tuning without weights to begin with, unless it is asked for or goes on.

    ``init.source=scratch`` asks for it and then means none.

    Raises:
        ConfigError: neither ``init.source`` nor ``run.resume`` is set.
    """
    given = settings.init.source or settings.run.resume
    if not given and not (Path(settings.run.dir) / "config.yaml").exists():
        raise ConfigError(
            "init.source: fine-tuning needs weights to begin with: a run, a checkpoint, an export"
            " or a released file; init.source=scratch trains without",
            key="init.source",
        )
    if settings.init.source == "scratch":
        settings.init.source = ""


def _training_data(settings: TrainConfig) -> Manifest:
    where = settings.data.train
    if not where:
        raise ConfigError("data.train is required: a directory of shards", key="data.train")
    for key, place in _data_places(settings).items():
        if is_remote(place) and not settings.data.cache_dir and not settings.data.stream:
            raise ConfigError(
                f"data.cache_dir is required to read {key} from {place}: a directory on a local"
                " disk, shared by the ranks of a node",
                key="data.cache_dir",
            )
    if not is_remote(where) and not (Path(where) / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"data.train: no {MANIFEST_NAME} in {where}; make shards with"
            " python -m data_prep build",
            key="data.train",
        )
    return Manifest.of_training(settings.data)


def _data_places(settings: TrainConfig) -> dict[str, str]:
    """Where the training set and every evaluation set is, by key."""
    places = {"data.train": settings.data.train}
    places |= {"data.val": settings.data.val} if settings.data.val else {}
    return places | {f"eval.extra.{name}": s.data for name, s in settings.eval.extra.items()}


def _steps(settings: TrainConfig, manifest: Manifest) -> None:
    """The batch is no larger than the data, and the schedule fits into the run."""
    from l2vit.data.subset import subset_ids
    from l2vit.train.schedule import Schedule

    where, seed = settings.data.train, settings.run.seed
    subset = subset_ids(settings.data.subset, where, manifest, seed=seed)
    samples, batch = manifest.samples if subset is None else len(subset), settings.schedule
    if batch.global_batch > samples:
        raise ConfigError(
            f"schedule.global_batch: {batch.global_batch} is more than the {samples:,} images to"
            " train on",
            key="schedule.global_batch",
        )
    per_epoch = samples // batch.global_batch
    with _keys_named():
        Schedule.build(settings.schedule, settings.optim, steps_per_epoch=per_epoch)


def _evaluation_data(settings: TrainConfig, trained: Manifest) -> None:
    for key, place in _data_places(settings).items():
        if key == "data.train":
            continue
        try:
            classes = Manifest.load(place).classes
        except UserError as error:
            raise ConfigError(f"{key}: {error}", key=key) from None
        if not set(classes) & set(trained.classes):
            raise ConfigError(f"{key}: no class in common with data.train", key=key)


def _first_weights(settings: TrainConfig) -> None:
    source = settings.init.source
    if source and not Path(settings.run.dir).exists() and not Path(source).exists():
        raise ConfigError(f"init.source: no such file or directory: {source}", key="init.source")
    resume = settings.run.resume
    if resume and not Path(resume).exists():
        raise ConfigError(f"run.resume: no such run or checkpoint: {resume}", key="run.resume")


def _network(settings: TrainConfig) -> None:
    """Build it from shapes alone: the name, arguments and evaluation sizes must be possible."""
    import torch

    with _keys_named(), torch.device("meta"):
        tasks.kind(settings.task).make(settings).network()


@contextlib.contextmanager
def _keys_named() -> Iterator[None]:
    """Take the key of a ConfigError raised inside from the beginning of its message."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error), key=error.key or str(error).partition(":")[0]) from None
