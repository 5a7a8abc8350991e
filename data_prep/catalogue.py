"""Every good image of pass 1, on disk in the order of the units: records and their names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.records import RECORD, UnitResult, Workspace
from data_prep.sources import Unit
from data_prep.spill import RUN, Spill
from l2vit import files

CHUNK = RUN
"""Records looked at together."""


class Catalogue:
    """Records by row: the place of an image in unit order."""

    def __init__(self, workspace: Workspace, starts: np.ndarray, seen: Sequence[int]) -> None:
        self._workspace = workspace
        self.starts = starts
        """int64 (units + 1,): first row of each unit, then the total."""
        self.seen = seen
        """Members looked at in each unit."""
        self.listed_sources: list[int] = []
        """Rows whose source bytes, not those written, are on the exclusion list."""
        self.renamed: dict[int, tuple[int, int]] = {}
        """Offset and size of the text of images that got another key."""
        self._records = np.memmap(workspace.records, RECORD, "r") if len(self) else None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, records: np.ndarray) -> np.ndarray:
        """int64: rows of records, in whatever order they come."""
        return self.starts[records["unit"]] + records["row"]

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, records) from the first to the last."""
        for start in range(0, len(self), CHUNK):
            offset = start * RECORD.itemsize
            yield start, np.fromfile(self._workspace.records, RECORD, CHUNK, offset=offset)

    def record(self, row: int) -> np.void:
        """One record."""
        assert self._records is not None
        return self._records[row]

    def raw_texts(self, start: int, records: np.ndarray) -> Iterator[bytes]:
        """``key\\tmember name`` of each of a chunk's records, read in one go."""
        first = int(records["text_offset"][0])
        sizes = records["text_size"].tolist()
        with self._workspace.text.open("rb") as stream:
            content = os.pread(stream.fileno(), sum(sizes), first)
            place = 0
            for row, size in enumerate(sizes, start):
                if row in self.renamed:
                    offset, other = self.renamed[row]
                    yield os.pread(stream.fileno(), other, offset)
                else:
                    yield content[place : place + size]
                place += size

    def texts(self, row: int) -> tuple[str, str]:
        """(key, member name) of one image."""
        record = self.record(row)
        place = (int(record["text_offset"]), int(record["text_size"]))
        offset, size = self.renamed.get(row, place)
        with self._workspace.text.open("rb") as stream:
            raw = os.pread(stream.fileno(), size, offset)
        key, _, name = raw.decode("utf-8", "surrogateescape").partition("\t")
        return key, name

    def rename(self, records: np.ndarray) -> None:
        """Point records at the texts of their new keys, in place."""
        if not self.renamed:
            return
        rows = self.rows(records)
        for at in np.flatnonzero(np.isin(rows, list(self.renamed))):
            offset, size = self.renamed[int(rows[at])]
            records["text_offset"][at], records["text_size"][at] = offset, size


def merge_results(
    workspace: Workspace, units: Sequence[Unit], listed: frozenset[str] = frozenset()
) -> Catalogue:
    """Join the results of all units.

    Args:
        workspace: the build's files.
        units: in order.
        listed: SHA-256 on the exclusion list, to compare with those of repaired images' sources.
    """
    starts, seen, place, rows = [0], [], 0, list[int]()
    with (
        files.atomic_writer(workspace.text) as texts,
        files.atomic_writer(workspace.records) as records,
    ):
        for unit in units:
            result = UnitResult.load(workspace.unit_result(unit.number))
            result.records["text_offset"] += np.uint64(place)
            for event in result.events:
                if event["row"] >= 0 and event["sha256"] in listed:
                    rows.append(starts[-1] + event["row"])
            records.write(result.records.tobytes())
            texts.write(result.text)
            starts.append(starts[-1] + len(result.records))
            place += len(result.text)
            seen.append(result.seen)
    with files.atomic_writer(workspace.starts) as stream:
        np.save(stream, np.array(starts, np.int64))
    catalogue = Catalogue(workspace, np.array(starts, np.int64), seen)
    catalogue.listed_sources = rows
    return catalogue


def unit_starts(workspace: Workspace, units: int) -> np.ndarray:
    """int64 (units + 1,): first row of each unit, then the total."""
    if workspace.starts.exists():
        return np.load(workspace.starts)
    counts = np.bincount(np.memmap(workspace.records, RECORD, "r")["unit"], minlength=units)
    return np.concatenate([[0], np.cumsum(counts)])


def sorted_by_rank(catalogue: Catalogue, folder: Path) -> Spill:
    """All records, ready to be read in the order of the shuffle."""
    spill = Spill(folder, RECORD, "rank", len(catalogue))
    for _, records in catalogue.chunks():
        spill.add(records)
    return spill


def make_keys_unique(catalogue: Catalogue, by_rank: Spill, text: Path) -> None:
    """Give images that would share a key (``x.png`` beside ``x.jpg``) keys of their own.

    Equal keys have equal ranks, so they are neighbours in the order of ranks; all but the first
    get a suffix made from the name of the member.
    """
    taken: set[str] = set()
    place = text.stat().st_size
    with text.open("ab", buffering=0) as stream:
        for run in by_rank.runs():
            equal = np.flatnonzero(run["rank"][1:] == run["rank"][:-1])
            rows = catalogue.rows(run)
            for one, other in zip(rows[equal].tolist(), rows[equal + 1].tolist(), strict=True):
                key, member = catalogue.texts(other)
                if key not in taken and catalogue.texts(one)[0] != key:
                    continue  # two keys that share 64 bits of hash by chance
                taken.add(key)
                record = catalogue.record(other)
                name = f"{record['unit']}:{record['row']}:{member}"
                suffix = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
                line = f"{key}-{suffix}\t{member}".encode("utf-8", "surrogateescape")
                stream.write(line)
                catalogue.renamed[other] = (place, len(line))
                place += len(line)
