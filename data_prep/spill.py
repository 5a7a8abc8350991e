"""Sorting more records than memory holds: into buckets by their first bits, then one by one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from l2vit.errors import UserError

RUN = 1 << 21  # records: what is sorted in memory at a time
_MOST_BITS = 9  # 512 open files


class Spill:
    """Records on disk, in buckets by the leading bits of a uint64 field that is evenly spread."""

    def __init__(self, folder: Path, dtype: np.dtype, key: str, total: int) -> None:
        """Make the bucket files in ``folder`` (replaced) for about ``total`` records."""
        self._folder, self._dtype, self._key = folder, dtype, key
        self._bits = min(_MOST_BITS, max(0, (total - 1) // RUN).bit_length())
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._files: list[BinaryIO] = [path.open("wb", buffering=0) for path in self._paths()]

    def _paths(self) -> list[Path]:
        return [self._folder / f"{number:03d}.bin" for number in range(1 << self._bits)]

    def add(self, records: np.ndarray) -> None:
        """Append records; those with equal keys keep their order.

        Raises:
            UserError: the disk is full.
        """
        buckets = (records[self._key] >> np.uint64(64 - self._bits)) if self._bits else None
        try:
            if buckets is None:
                records.tofile(self._files[0])
                return
            numbers = buckets.astype(np.uint16)
            order = np.argsort(numbers, kind="stable")
            ends = np.cumsum(np.bincount(numbers, minlength=len(self._files)))
            for stream, rows in zip(self._files, np.split(order, ends[:-1]), strict=True):
                records[rows].tofile(stream)
        except OSError as error:
            raise UserError(f"cannot write {self._folder}: {error.strerror or error}") from error

    def runs(self) -> Iterator[np.ndarray]:
        """All records in order of the key, equal keys in the order they were added.

        A run holds all records of its range of keys, so equal keys are never in two runs.
        """
        self._close()
        for path in self._paths():
            records = np.fromfile(path, self._dtype)
            yield records[np.argsort(records[self._key], kind="stable")]

    def _close(self) -> None:
        for stream in self._files:
            stream.close()
        self._files = []

    def delete(self) -> None:
        """Give the disk space back."""
        self._close()
        shutil.rmtree(self._folder, ignore_errors=True)
