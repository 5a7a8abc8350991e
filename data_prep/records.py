"""What is remembered of each good image between the passes, and the files that hold it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2vit import files
from l2vit.errors import UserError

RECORD = np.dtype(
    [
        ("rank", "<u8"),  # hash of seed and key: sorting by it is the global shuffle
        ("sha_high", "<u8"),  # first 128 bits of the SHA-256 of the bytes written
        ("sha_low", "<u8"),
        ("phash", "<u8"),
        ("raw_offset", "<u8"),  # of the member's data in its source file
        ("offset", "<u8"),  # in the unit's spool, where flagged
        ("text_offset", "<u8"),  # of "key\tmember name"
        ("raw_size", "<u4"),
        ("size", "<u4"),  # of the bytes written
        ("unit", "<u4"),
        ("row", "<u4"),  # place in the unit, in archive order
        ("label", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("text_size", "<u2"),
        ("form", "u1"),  # source format: index into FORMS
        ("flags", "u1"),
    ]
)
SPOOLED = 1
REPAIRED = 2
FORMS = ("jpeg", "png", "gif", "bmp", "webp", "tiff", "avif")


def key_salt(seed: int, purpose: str) -> bytes:
    """What makes hashes for one purpose independent of those for another."""
    return f"{purpose}:{seed}".encode()


def key_hash(seed: int, purpose: str, key: str) -> int:
    """64 stable pseudo-random bits from ``key``; independent for each ``purpose``."""
    salt = key_salt(seed, purpose)
    digest = hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest()
    return int.from_bytes(digest, "little")


@dataclass
class UnitResult:
    """What pass 1 found in one unit."""

    records: np.ndarray
    text: bytes
    events: list[dict[str, Any]]
    """One per image left out or repaired, in archive order."""
    seen: int
    """Members looked at."""
    forms: dict[str, int]

    def save(self, path: Path) -> None:
        """Write the result, complete or absent."""
        extra = {"events": self.events, "seen": self.seen, "forms": self.forms}
        with files.atomic_writer(path) as stream:
            np.savez(
                stream,
                records=self.records,
                text=np.frombuffer(self.text, np.uint8),
                extra=np.frombuffer(json.dumps(extra).encode(), np.uint8),
            )

    @classmethod
    def load(cls, path: Path) -> UnitResult:
        """Read what :meth:`save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as content:
                extra = json.loads(content["extra"].tobytes())
                return cls(content["records"], content["text"].tobytes(), **extra)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and run again") from error


@dataclass(frozen=True)
class Workspace:
    """Names inside the build directory ``OUT/.build``."""

    root: Path

    def unit_result(self, unit: int) -> Path:
        return self.root / "parts" / f"{unit:06d}.npz"

    def spool(self, unit: int) -> Path:
        return self.root / "spool" / f"{unit:06d}.bin"

    def gathered(self, split: str, shard: int) -> Path:
        return self.root / "gathered" / f"{split}-{shard:06d}.bin"

    def order(self, split: str) -> Path:
        return self.root / f"order-{split}.npy"

    def bounds(self, split: str) -> Path:
        return self.root / f"shards-{split}.npy"

    def done(self, split: str, shard: int) -> Path:
        return self.root / "done" / f"{split}-{shard:06d}.json"

    @property
    def build(self) -> Path:
        return self.root / "build.json"

    @property
    def units(self) -> Path:
        return self.root / "units.json"

    @property
    def text(self) -> Path:
        return self.root / "names.bin"

    @property
    def records(self) -> Path:
        """All records, in unit order."""
        return self.root / "records.bin"

    @property
    def starts(self) -> Path:
        """First row of each unit in the records."""
        return self.root / "starts.npy"

    @property
    def scratch(self) -> Path:
        """Where records are sorted."""
        return self.root / "scratch"

    @property
    def fate(self) -> Path:
        """uint8 per good image, in unit order: index into plan.FATES."""
        return self.root / "fate.npy"

    @property
    def dropped(self) -> Path:
        return self.root / "dropped.jsonl"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def thumbnails(self) -> Path:
        """Small pictures of rejected and repaired images, for the report."""
        return self.root / "thumbnails.json"

    def tidy(self) -> None:
        """Delete what neither ``verify --repair`` nor ``report`` needs."""
        for name in ("parts", "spool", "staged", "gathered", "done", "scratch"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for path in (self.fate, self.dropped, self.records, self.starts, self.root / "places.npy"):
            path.unlink(missing_ok=True)

    def create(self) -> None:
        """Make the directories."""
        for name in ("parts", "spool", "staged", "gathered", "done"):
            try:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make {self.root / name}: {error.strerror}") from error
