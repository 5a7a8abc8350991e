"""Which checkpoint a run continues from, and whether it may."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch

from l2vit.config import read_tree, to_tree
from l2vit.data.manifest import Manifest
from l2vit.errors import ConfigError, UserError
from l2vit.train import checkpoint
from l2vit.train.checkpoint import Reader
from l2vit.train.config import TrainConfig
from l2vit.train.distributed import World
from l2vit.train.zero import full_shape

_FIXED = ("model.name", "model.window_size", "model.args.", "run.seed", "schedule.global_batch")
_FREE = ("run.dir", "about.")


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
            found |= _flat({each.name: each.default}, prefix)
    return found


def to_continue(
    config: TrainConfig, world: World, directory: Path, manifest: Manifest
) -> Reader | None:
    """The checkpoint to continue from: the run's own, else that of ``run.resume``, else None.

    Raises:
        UserError: it was trained on other classes or data.
        ConfigError: it was trained with another seed or global batch.
    """
    reader = newest_sound(directory, world)
    if reader is None and config.run.resume:
        reader = Reader(checkpoint.find(Path(config.run.resume)))
        world.raise_on_all_ranks(_verified(reader, world))
    if reader is not None:
        _check_continuable(reader, config, manifest)
    return reader


def newest_sound(directory: Path, world: World) -> Reader | None:
    """The run's newest checkpoint whose hashes fit; damaged ones are renamed and told of.

    The ranks share the hashing among themselves.
    """
    while steps := world.broadcast(checkpoint.complete_steps(directory)):
        path = checkpoint.step_directory(directory, steps[-1])
        reader: Reader | None = None
        try:
            reader = Reader(path)
            problem = _verified(reader, world)
        except UserError as error:
            problem = error
        problems = [text for text in world.gather(str(problem or "")) if text]
        if not problems:
            return reader
        if world.main:
            aside = path.with_name(f"damaged-{path.name}-{int(time.time())}")
            path.rename(aside)
            before = f"step {steps[-2]}" if len(steps) > 1 else "the beginning"
            print(
                f"warning: {problems[0]}; kept as {aside.name}; continuing from {before}",
                file=sys.stderr,
                flush=True,
            )
        world.barrier()
    return None


def _verified(reader: Reader, world: World) -> UserError | None:
    """What is wrong with this rank's share of the checkpoint's files."""
    try:
        reader.verify(world.rank, world.size)
    except UserError as error:
        return error
    return None


def _check_continuable(reader: Reader, config: TrainConfig, manifest: Manifest) -> None:
    meta = reader.meta
    if meta.class_hash != manifest.class_hash:
        raise UserError(
            f"{reader.directory} was trained on other classes than {config.data.train}; to start"
            " from its weights set init.source instead, with a fresh run.dir"
        )
    if meta.manifest_hash != manifest.hash:
        raise UserError(
            f"{reader.directory} was trained on other data than {config.data.train}: its order of"
            " samples cannot be continued; restore the data or start with a fresh run.dir"
        )
    for key, then, now in (
        ("run.seed", meta.state.get("seed"), config.run.seed),
        (
            "schedule.global_batch",
            meta.config["schedule"]["global_batch"],
            config.schedule.global_batch,
        ),
    ):
        if then != now:
            raise ConfigError(
                f"{key}: {reader.directory} was trained with {then}, the configuration says {now};"
                " continue with the same value or use a fresh run.dir"
            )


def check_same_model(reader: Reader, network: torch.nn.Module) -> None:
    """Check that the checkpoint holds this model's parameters, in these shapes.

    Raises:
        UserError: names the first that differs.
    """
    wanted = {f"param/{name}": full_shape(p) for name, p in network.named_parameters()}
    held = {k: tuple(e["shape"]) for k, e in reader.tensors.items() if k.startswith("param/")}
    for key in sorted(wanted.keys() | held.keys()):
        if wanted.get(key) != held.get(key):
            raise UserError(
                f"{reader.directory} is a checkpoint of another model: {key} has shape"
                f" {held.get(key, 'none')}, the configured model needs {wanted.get(key, 'none')};"
                " mend model.* or use a fresh run.dir"
            )
