"""Which samples of a manifest a run trains on: classes, a fraction, a blacklist of keys."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from l2vit.data.config import SubsetConfig
from l2vit.data.manifest import Manifest
from l2vit.data.rng import derive_key, uniforms
from l2vit.data.shards import BadSample, read_index, read_labels
from l2vit.data.storage import open_source
from l2vit.errors import ConfigError, UserError

_KEYS = re.compile(rb"\n\S+ \d+ \d+ (\S+)\.")
"""The key of each line of an index: the first member's name without its extension."""


def subset_ids(
    config: SubsetConfig, directory: Path | str, manifest: Manifest, *, seed: int
) -> np.ndarray | None:
    """Sorted ids of the samples that every setting of ``config`` admits; None for all.

    Keys are looked up in the indexes, classes in the label files beside them (in the shards
    themselves where there are none).

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


def _of_classes(directory: Path | str, manifest: Manifest, path: Path) -> np.ndarray:
    wanted = _lines(path, "classes")
    number = {name: label for label, name in enumerate(manifest.classes)}
    unknown = [name for name in wanted if name not in number]
    if unknown:
        raise ConfigError(
            f"data.subset.classes: {path} names {unknown[0]}, no class of {directory}"
        )
    admitted = np.zeros(len(manifest.classes), bool)
    admitted[[number[name] for name in wanted]] = True
    return admitted[read_labels(directory, manifest)]


def _with_keys(directory: Path | str, manifest: Manifest, path: Path) -> np.ndarray:
    wanted = frozenset(line.encode() for line in _lines(path, "exclude"))
    found = np.zeros(manifest.samples, bool)
    missing, source = set(wanted), open_source(directory)
    for shard, first in zip(manifest.shards, manifest.first_ids.tolist(), strict=False):
        index = f"{source.address}/{shard.index_name}"
        try:
            lines = source.read(shard.index_name)
            keys = _KEYS.findall(read_index(lines, shard.index_name))
        except (BadSample, OSError) as error:
            raise UserError(f"cannot read {index}: {error}") from None
        if len(keys) != shard.samples:
            raise UserError(f"{index} names {len(keys)} samples, the manifest {shard.samples}")
        if not wanted.isdisjoint(keys):
            found[[first + number for number, key in enumerate(keys) if key in wanted]] = True
            missing.difference_update(keys)
    if missing:
        name = min(missing).decode()
        raise ConfigError(f"data.subset.exclude: {path} names {name}, no key in {directory}")
    return found
