"""Which samples of a manifest a run trains on: classes, a fraction, a blacklist of keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from l2vit.data.config import SubsetConfig
from l2vit.data.manifest import Manifest
from l2vit.data.philox import derive_key, uniforms
from l2vit.data.shards import INDEX_VERSION, ShardReader
from l2vit.errors import ConfigError, UserError


def subset_ids(
    config: SubsetConfig, directory: Path, manifest: Manifest, *, seed: int
) -> np.ndarray | None:
    """Sorted ids of the samples that every setting of ``config`` admits; None for all.

    Classes and keys are looked up in the shards: a pass over the indexes for the keys, over the
    labels for the classes.

    Raises:
        ConfigError: a list names a class or a key the manifest does not have, or nothing is left.
    """
    keep = np.ones(manifest.samples, bool)
    if config.fraction < 1:
        keep &= _fraction(manifest, config.fraction, seed)
    if config.classes:
        keep &= _of_classes(directory, manifest, Path(config.classes))
    if config.exclude:
        keep &= ~_with_keys(directory, manifest, Path(config.exclude))
    if keep.all():
        return None
    if not keep.any():
        raise ConfigError("data.subset leaves no sample to train on")
    kind = np.int32 if manifest.samples < 2**31 else np.int64
    return np.flatnonzero(keep).astype(kind)


def _fraction(manifest: Manifest, fraction: float, seed: int) -> np.ndarray:
    keep = np.empty(manifest.samples, bool)
    key, step = derive_key("fraction", manifest.hash, seed), 1 << 18
    for start in range(0, manifest.samples, step):
        ids = np.arange(start, min(start + step, manifest.samples))
        keep[ids] = uniforms(key, ids, 1)[:, 0] < fraction
    return keep


def _lines(path: Path, what: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.subset.{what}: cannot read {path}: {error}") from None
    return [line for line in lines if line]


def _of_classes(directory: Path, manifest: Manifest, path: Path) -> np.ndarray:
    wanted = _lines(path, "classes")
    number = {name: label for label, name in enumerate(manifest.classes)}
    unknown = [name for name in wanted if name not in number]
    if unknown:
        raise ConfigError(
            f"data.subset.classes: {path} names {unknown[0]}, no class of {directory}"
        )
    admitted = np.zeros(len(manifest.classes), bool)
    admitted[[number[name] for name in wanted]] = True
    return admitted[ShardReader(directory, manifest).labels()]


def _with_keys(directory: Path, manifest: Manifest, path: Path) -> np.ndarray:
    keys = set(_lines(path, "exclude"))
    found = np.zeros(manifest.samples, bool)
    at, missing = 0, set(keys)
    for shard in manifest.shards:
        index = directory / shard.index_name
        try:
            lines = index.read_text().splitlines()
        except OSError as error:
            raise UserError(f"cannot read {index}: {error.strerror or error}") from None
        if not lines or not lines[0].startswith(INDEX_VERSION.decode()):
            raise UserError(f"{index} is no DALI index of version 1.2")
        for line in lines[1:]:
            name = line.split(" ", 4)[3]
            key = name.rsplit(".", 1)[0]
            if key in keys:
                found[at] = True
                missing.discard(key)
            at += 1
    if missing:
        raise ConfigError(
            f"data.subset.exclude: {path} names {min(missing)}, no key in {directory}"
        )
    return found
