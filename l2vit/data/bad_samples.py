"""Samples that turn out unreadable during a run: replaced, recorded, and limited in number."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from l2vit.errors import UserError

LOG_NAME = "bad_samples.jsonl"


@dataclass(frozen=True)
class BadRecord:
    """One unusable sample: one line of ``bad_samples.jsonl``."""

    sample_id: int
    key: str
    shard: str
    reason: str


class BadSampleLog:
    """Counts different bad samples of a run and stops it past the limit.

    Args:
        path: JSON lines shared by the ranks of a run and kept when it resumes; None to only count.
        rank: written into each line.
        limit: most bad samples over all ranks that share ``path``.
        directory: of the shards, for messages.
    """

    def __init__(self, path: Path | None, *, rank: int, limit: int, directory: Path | str) -> None:
        self._path, self._rank, self._directory = path, rank, directory
        self.limit = limit
        self._seen: set[int] = set()

    def record(self, bad: list[BadRecord], *, complete: bool = True) -> None:
        """Note samples found bad; ``complete`` tells whether all could be replaced.

        Raises:
            UserError: not complete, or more than the limit so far; names the last one.
        """
        if not bad:
            return
        fresh = [item for item in bad if item.sample_id not in self._seen]
        self._seen.update(self._recorded() if fresh else ())
        self._append([item for item in fresh if item.sample_id not in self._seen])
        self._seen.update(item.sample_id for item in fresh)
        if not complete or len(self._seen) > self.limit:
            raise UserError(self._verdict(bad[-1]))

    def _verdict(self, last: BadRecord) -> str:
        many = f"more than data.max_bad_samples={self.limit}"
        if len(self._seen) <= self.limit:
            many = "and no good one is left to take their place"
        again = f"mend the shards with `python -m data_prep verify {self._directory} --repair`"
        listed = ""
        if self._path:
            listed = f"; all are in {self._path}"
            again += f", move {self._path.name} away and run again"
        return (
            f"{len(self._seen)} unusable samples, {many}; the last on rank {self._rank}:"
            f" {last.key} in {last.shard} ({last.reason}){listed}; {again}"
        )

    def _append(self, fresh: list[BadRecord]) -> None:
        if self._path is None or not fresh:
            return
        lines = "".join(
            json.dumps(
                {
                    "key": item.key,
                    "shard": item.shard,
                    "rank": self._rank,
                    "sample_id": item.sample_id,
                    "reason": item.reason,
                }
            )
            + "\n"
            for item in fresh
        )
        try:
            # one write in append mode: lines of several ranks do not mix
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if self._path.read_bytes()[-1:] not in (b"", b"\n"):
                    lines = "\n" + lines  # a crash cut the last line off
                os.write(descriptor, lines.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error

    def _recorded(self) -> set[int]:
        return set() if self._path is None else recorded(self._path)


def recorded(path: Path) -> set[int]:
    """Sample ids in a ``bad_samples.jsonl``; none where there is no such file."""
    seen: set[int] = set()
    if not path.exists():
        return seen
    for line in path.read_text().splitlines():
        try:
            seen.add(int(json.loads(line)["sample_id"]))
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off by a crash counts for nothing
    return seen


class NoBadSamples:
    """For evaluation, which is exact or fails: refuses the first unusable sample."""

    def __init__(self, directory: Path | str) -> None:
        self._directory = directory

    def record(self, bad: list[BadRecord], *, complete: bool = True) -> None:
        """Pass what is sound.

        Raises:
            UserError: anything is bad; names it.
        """
        if bad:
            raise UserError(
                f"cannot evaluate on {self._directory}: {bad[0].key} in {bad[0].shard} is unusable"
                f" ({bad[0].reason}), and an evaluation leaves no image out; mend the shards with"
                f" `python -m data_prep verify {self._directory} --repair`"
            )
