"""Images that occur more than once, by the hash of the bytes written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.catalogue import Catalogue
from data_prep.spill import Spill

_HASH = np.dtype(
    [
        ("sha_high", "<u8"),
        ("sha_low", "<u8"),
        ("row", "<u8"),
        ("label", "<u4"),
        ("later", "u1"),  # 0: of a validation or test part of the source's own
    ]
)


@dataclass(frozen=True)
class Duplicates:
    """Pairs of rows, each int64 (n, 2), ascending."""

    dropped: np.ndarray
    """A copy, and the image of its class that is kept for it."""
    kept: np.ndarray
    """The same for copies inside a validation or test part of the source's own, which stay: its
    images are what published accuracies are measured on."""
    crossing: np.ndarray
    """Equal images whose classes differ."""


def find_duplicates(
    catalogue: Catalogue,
    alive: Callable[[int, int], np.ndarray],
    whole_units: np.ndarray,
    folder: Path,
) -> Duplicates:
    """Compare all images that are to be written.

    Args:
        catalogue: all good images.
        alive: which images between two rows are to be written, as bool.
        whole_units: bool (units,) units of parts that are kept whole.
        folder: for temporary files.
    """
    spill = Spill(folder, _HASH, "sha_high", len(catalogue))
    for start, records in catalogue.chunks():
        rows = np.flatnonzero(alive(start, start + len(records)))
        hashes = np.zeros(len(rows), _HASH)
        for name in ("sha_high", "sha_low", "label"):
            hashes[name] = records[name][rows]
        hashes["row"] = rows + start
        hashes["later"] = ~whole_units[records["unit"][rows]]
        spill.add(hashes)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [_pairs(run) for run in spill.runs()]
    spill.delete()
    columns = zip(*found, strict=True)
    return Duplicates(*(_ascending(np.concatenate(pairs)) for pairs in columns))


def _pairs(run: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of a run that is sorted by the first half of the hash."""
    near = run["sha_high"][1:] == run["sha_high"][:-1]
    alone = np.ones(len(run), bool)
    alone[1:] &= ~near
    alone[:-1] &= ~near
    run = run[~alone]
    run = run[np.lexsort((run["later"], run["label"], run["sha_low"], run["sha_high"]))]
    first, second = run[:-1], run[1:]
    same = (first["sha_high"] == second["sha_high"]) & (first["sha_low"] == second["sha_low"])
    label = first["label"] == second["label"]
    inner = np.flatnonzero(same & label)
    # The first of each stretch of equals stands for it: walk back over its places.
    leads = np.ones(len(run), bool)
    leads[inner + 1] = False
    lead = np.maximum.accumulate(np.where(leads, np.arange(len(run)), 0))
    rows = run["row"].astype(np.int64)
    copies = np.stack([rows[inner + 1], rows[lead[inner + 1]]], axis=1)
    later = run["later"][inner + 1].astype(bool)
    crossing = np.flatnonzero(same & ~label)
    return copies[later], copies[~later], np.stack([rows[crossing], rows[crossing + 1]], axis=1)


def _ascending(pairs: np.ndarray) -> np.ndarray:
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
