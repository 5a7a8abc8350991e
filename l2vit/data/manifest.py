"""The manifest of a shard directory: the one contract between data_prep and the loaders.

``manifest.json`` is written last, so a directory that has one is complete. Its ``hash`` covers
what a loader sees (shards, counts, classes) and not where it came from, so the same images
prepared twice have the same hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from l2vit import files
from l2vit.data.config import DataConfig
from l2vit.data.shared_array import SharedArray
from l2vit.data.storage import is_remote, open_source
from l2vit.errors import UserError

FORMAT = 1
MANIFEST_NAME = "manifest.json"
LABEL_WIDTH = 5
"""Digits of a ``.cls`` member. Fixed, because DALI reads labels as equally long byte rows."""


def class_hash(classes: Sequence[str]) -> str:
    """SHA-256 of the ordered class identifiers (wnids), one a line.

    It travels from manifest to checkpoint to exported model: equal hashes mean that row i of a
    head means the same class.
    """
    return hashlib.sha256("".join(f"{name}\n" for name in classes).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One tar file and its DALI index."""

    name: str
    """File name of the tar, ``shard-000000.tar``; the index is ``shard-000000.idx``."""
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return Path(self.name).with_suffix(".idx").name


class ShardNames:
    """Names of shards by number; what a worker process is sent of them does not grow with them."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._names = SharedArray(np.array([shard.name.encode() for shard in shards], np.bytes_))

    def __len__(self) -> int:
        return len(self._names.values)

    def __getitem__(self, shard: int) -> str:
        return self._names.values[shard].decode()


@dataclass(frozen=True)
class Manifest:
    """What a shard directory holds.

    Samples are numbered 0 … samples − 1 in the order of the shards and of the tar members; that
    *sample id* is what the order function, the logs and the bad-sample records speak of.
    """

    dataset: str
    split: str
    classes: tuple[str, ...]
    """Ordered identifiers (wnids); label i means ``classes[i]``."""
    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...]
    """Samples of each class in this split."""
    class_names: tuple[str, ...] = ()
    """Human-readable names, same order; empty where none are known."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Sources, options, split rule, versions; not part of the hash."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def class_hash(self) -> str:
        return class_hash(self.classes)

    @property
    def hash(self) -> str:
        """SHA-256 over shards, counts and classes: the identity of the data."""
        content = {
            "format": FORMAT,
            "shards": [[s.name, s.samples, s.sha256] for s in self.shards],
            "classes": self.class_hash,
        }
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    @property
    def first_ids(self) -> np.ndarray:
        """int64 (shards + 1,): first sample id of each shard, then the total."""
        counts = [shard.samples for shard in self.shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def save(self, directory: Path) -> None:
        """Write ``manifest.json`` into ``directory``; call it after everything else is there."""
        files.write_json(
            directory / MANIFEST_NAME,
            {
                "format": FORMAT,
                "hash": self.hash,
                "dataset": self.dataset,
                "split": self.split,
                "samples": self.samples,
                "class_hash": self.class_hash,
                "classes": list(self.classes),
                "class_names": list(self.class_names),
                "class_counts": list(self.class_counts),
                "shards": [asdict(shard) for shard in self.shards],
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, directory: Path | str) -> Manifest:
        """Read and check ``manifest.json`` of a directory, here or at an address.

        Raises:
            UserError: no manifest (the build did not finish), another format, or a manifest
                whose recorded hashes and counts do not agree with its content.
        """
        source = open_source(directory)
        path = f"{source.address}/{MANIFEST_NAME}"
        try:
            content = source.read(MANIFEST_NAME)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{directory} holds no {MANIFEST_NAME}: not a finished shard directory;"
                f" finish `python -m data_prep build ... --out {directory}`"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        try:
            raw = json.loads(content)
        except ValueError as error:
            raise UserError(f"manifest {path} cannot be read: {error}") from None
        manifest = cls._parse(raw, path)
        for key in ("hash", "class_hash", "samples"):
            if raw.get(key) != getattr(manifest, key):
                raise UserError(f"{path}: recorded {key} disagrees with its content; rebuild it")
        return manifest

    @classmethod
    def _parse(cls, raw: Any, path: str) -> Manifest:
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else None
            raise UserError(f"{path}: format {found!r}; this version reads format {FORMAT}")
        try:
            return cls(
                dataset=raw["dataset"],
                split=raw["split"],
                classes=tuple(raw["classes"]),
                class_names=tuple(raw["class_names"]),
                class_counts=tuple(raw["class_counts"]),
                shards=tuple(Shard(**shard) for shard in raw["shards"]),
                provenance=raw["provenance"],
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: malformed manifest ({error})") from error

    @classmethod
    def of_training(cls, data: DataConfig, *, check: bool = True) -> Manifest:
        """The manifest of ``data.train``; ``check`` looks at its shards, where they are files.

        Raises:
            UserError: of :meth:`load` and :meth:`require_shards`.
        """
        manifest = cls.load(data.train)
        if check and not data.stream and not is_remote(data.train):
            manifest.require_shards(Path(data.train))
        return manifest

    def require_shards(self, directory: Path) -> None:
        """Check that every tar and index is there with the recorded size (not their hashes).

        Raises:
            UserError: names the first missing or resized file.
        """
        with os.scandir(directory) as entries:
            present = {entry.name for entry in entries}
        for shard in self.shards:
            for name in (shard.name, shard.index_name):
                if name not in present:
                    raise UserError(
                        f"missing shard file {directory / name}; rebuild it with"
                        f" `python -m data_prep verify {directory} --repair`"
                    )
            size = (directory / shard.name).stat().st_size
            if size != shard.bytes:
                raise UserError(
                    f"{directory / shard.name} has {size} bytes, the manifest says {shard.bytes}"
                )
