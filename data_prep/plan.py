"""Between the passes: duplicates, exclusions, the split, the global shuffle, the shard bounds.

The shuffle sorts by a hash of each sample's key. That is a uniform random permutation which no
worker count, file order or restart can change, and which needs one record (84 bytes) of memory an
image, and three integers while sorting: about 1.7 GB for 14.2 million.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.options import Options
from data_prep.records import RECORD, Part, Workspace, key_hash
from data_prep.shards import END, sample_bytes
from data_prep.sources import Unit
from l2vit import files
from l2vit.errors import UserError

FATES = ("train", "val", "duplicate", "excluded", "class-too-small", "other-part")
TRAIN, VAL, DUPLICATE, EXCLUDED, SMALL, OTHER = range(len(FATES))
_CHUNK = 1 << 18


@dataclass
class Plan:
    """What the second pass will write."""

    classes: tuple[str, ...]
    shards: dict[str, int]
    """Shards of each split."""
    samples: dict[str, int]
    seen: int
    forms: dict[str, int]
    fates: dict[str, int]
    cross_class_duplicates: int
    notes: dict[str, Any] = field(default_factory=dict)


class Catalogue:
    """Every good image of pass 1: records in unit order, and their texts."""

    def __init__(self, records: np.ndarray, text: bytes | np.ndarray) -> None:
        self.records, self._text = records, text

    def texts(self, row: int) -> tuple[str, str]:
        """(key, member name) of one record."""
        record = self.records[row]
        start = int(record["text_offset"])
        raw = bytes(self._text[start : start + int(record["text_size"])])
        key, _, name = raw.decode("utf-8", "surrogateescape").partition("\t")
        return key, name


def merge_parts(workspace: Workspace, units: list[Unit]) -> tuple[Catalogue, int, dict[str, int]]:
    """Join the parts of all units.

    Returns:
        The catalogue, members seen, and images of each source format.
    """
    pieces, seen, forms, place = [], 0, Counter[str](), 0
    with files.atomic_writer(workspace.text) as stream:
        for unit in units:
            part = Part.load(workspace.part(unit.number))
            part.records["text_offset"] += np.uint64(place)
            pieces.append(part.records)
            stream.write(part.text)
            place += len(part.text)
            seen += part.seen
            forms.update(part.forms)
    total = sum(map(len, pieces))
    records = np.empty(total, RECORD)
    start = 0
    for piece in pieces:
        records[start : start + len(piece)] = piece
        start += len(piece)
    text = np.memmap(workspace.text, np.uint8, "r") if place else b""
    return Catalogue(records, text), seen, dict(forms)


def duplicates(records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact duplicates by the bytes written.

    Returns:
        int64 rows to drop (a same-class copy lies earlier), int64 rows of the copies kept for
        them, and int64 pairs (n, 2) of equal images whose classes differ.
    """
    order = np.lexsort((records["label"], records["sha_low"], records["sha_high"]))
    first, second = order[:-1], order[1:]
    same = (records["sha_high"][first] == records["sha_high"][second]) & (
        records["sha_low"][first] == records["sha_low"][second]
    )
    label = records["label"][first] == records["label"][second]
    inner = np.flatnonzero(same & label)
    # The first of each run of equals is kept: walk back over the run's places.
    leads = np.arange(len(order))
    starts = np.ones(len(order), bool)
    starts[inner + 1] = False
    leads = np.maximum.accumulate(np.where(starts, leads, 0))
    dropped = order[inner + 1]
    kept = order[leads[inner + 1]]
    crossing = np.flatnonzero(same & ~label)
    return dropped, kept, np.stack([first[crossing], second[crossing]], axis=1)


def split_fates(catalogue: Catalogue, options: Options, units: list[Unit]) -> np.ndarray:
    """uint8 (records,): TRAIN or VAL for each record by the split rule."""
    records = catalogue.records
    fates = np.zeros(len(records), np.uint8)
    if options.val_fraction or options.val_per_class:
        scores = np.fromiter(
            (key_hash(options.seed, "split", catalogue.texts(r)[0]) for r in range(len(records))),
            np.uint64,
            len(records),
        )
        if options.val_fraction:
            fates[scores < np.uint64(int(options.val_fraction * 2**64))] = VAL
        else:
            fates[_first_of_class(records["label"], scores, options.val_per_class)] = VAL
    elif options.val_first_per_class:
        places = np.arange(len(records))
        fates[_first_of_class(records["label"], places, options.val_first_per_class)] = VAL
    elif options.split == "val":
        fates[:] = VAL
    elif options.split == "both":
        roles = np.array([VAL if unit.split == "val" else TRAIN for unit in units], np.uint8)
        fates = roles[records["unit"]]
    return fates


def _first_of_class(labels: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Rows of the ``count`` lowest scores of each label."""
    order = np.lexsort((scores, labels))
    labels = labels[order]
    starts = np.searchsorted(labels, labels, side="left")
    return order[np.arange(len(order)) - starts < count]


def shard_bounds(sizes: np.ndarray, options: Options) -> np.ndarray:
    """int64 (shards + 1,): first sample of each shard; greedy within bytes and samples allowed."""
    ends = np.cumsum(sample_bytes(sizes))
    limit = options.shard_bytes - END
    bounds = [0]
    while bounds[-1] < len(sizes):
        start = bounds[-1]
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + limit, side="right")))
        if options.shard_samples:
            stop = min(stop, start + options.shard_samples)
        bounds.append(stop)
    return np.array(bounds, np.int64)


def write_order(
    catalogue: Catalogue, rows: np.ndarray, labels: np.ndarray, path: Path
) -> np.ndarray:
    """Write the records of ``rows`` in that order, with their final labels.

    Returns:
        uint32 (rows,): bytes of each image, in order.
    """
    with files.atomic_writer(path) as stream:
        header = {"descr": RECORD.descr, "fortran_order": False, "shape": (len(rows),)}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(rows), _CHUNK):
            chunk = catalogue.records[rows[start : start + _CHUNK]]
            chunk["label"] = labels[chunk["label"]]
            stream.write(chunk.tobytes())
    return catalogue.records["size"][rows]


def shuffled(records: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``rows`` in the order of their rank; equal ranks keep the source's order."""
    return rows[np.argsort(records["rank"][rows], kind="stable")]


def make_plan(
    options: Options, workspace: Workspace, units: list[Unit], classes: tuple[str, ...]
) -> Plan:
    """Decide the fate of every good image and where each kept one goes; write it down.

    Raises:
        UserError: nothing is left to write, or a part that was asked for would be empty.
    """
    catalogue, seen, forms = merge_parts(workspace, units)
    records = catalogue.records
    fates = split_fates(catalogue, options, units)
    events = list(_drop_duplicates(catalogue, units, fates))
    crossing = sum(event["kind"] == "note" for event in events)
    classes, labels, small = _keep_classes(records["label"], fates, classes, options)
    fates[small] = SMALL
    wanted = {"": (TRAIN,), "train": (TRAIN,), "val": (VAL,), "both": (TRAIN, VAL)}[options.split]
    fates[(fates <= VAL) & ~np.isin(fates, wanted)] = OTHER
    plan = Plan(classes, {}, {}, seen, forms, {}, crossing)
    for fate in wanted:
        split = FATES[fate]
        rows = shuffled(records, np.flatnonzero(fates == fate))
        if not len(rows):
            raise UserError(f"no image is left for the {split} part; see rejected.jsonl's reasons")
        _require_unique_keys(catalogue, rows)
        bounds = shard_bounds(write_order(catalogue, rows, labels, workspace.order(split)), options)
        with files.atomic_writer(workspace.bounds(split)) as stream:
            np.save(stream, bounds)
        plan.shards[split], plan.samples[split] = len(bounds) - 1, len(rows)
    plan.fates = {FATES[i]: int(n) for i, n in enumerate(np.bincount(fates, minlength=6)) if n}
    with files.atomic_writer(workspace.fate) as stream:
        np.save(stream, fates)
    lines = (json.dumps(event, ensure_ascii=False) + "\n" for event in events)
    files.write_text(workspace.dropped, "".join(lines))
    files.write_json(workspace.plan, plan.__dict__)
    return plan


def load_plan(workspace: Workspace) -> Plan:
    """The plan a former call wrote."""
    raw = files.read_json(workspace.plan, what="plan")
    return Plan(**{**raw, "classes": tuple(raw["classes"])})


def _drop_duplicates(
    catalogue: Catalogue, units: list[Unit], fates: np.ndarray
) -> Iterator[dict[str, Any]]:
    dropped, kept, crossing = duplicates(catalogue.records)
    fates[dropped] = DUPLICATE
    for row, first in sorted(zip(dropped.tolist(), kept.tolist(), strict=True)):
        yield _event("rejected", catalogue, units, row, "duplicate", first)
    for one, other in sorted(crossing.tolist()):
        yield _event("note", catalogue, units, other, "duplicate-across-classes", one)


def _event(
    kind: str, catalogue: Catalogue, units: list[Unit], row: int, reason: str, like: int
) -> dict[str, Any]:
    record = catalogue.records[row]
    unit = units[record["unit"]]
    key, member = catalogue.texts(row)
    return {
        "kind": kind,
        "source": unit.label,
        "member": member,
        "key": key,
        "label": int(record["label"]),
        "split": unit.split,
        "reason": reason,
        "detail": f"same bytes as {catalogue.texts(like)[0]}",
        "bytes": int(record["size"]),
        "sha256": f"{record['sha_high']:016x}{record['sha_low']:016x}",
    }


def _keep_classes(
    label: np.ndarray, fates: np.ndarray, classes: tuple[str, ...], options: Options
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Drop classes below the minimum.

    Returns:
        The classes left, int64 new label of each old one, bool (records,) of those dropped.
    """
    labels = np.arange(len(classes))
    none = np.zeros(len(label), bool)
    if not options.min_class_images:
        return classes, labels, none
    counts = np.bincount(label[fates <= VAL], minlength=len(classes))
    keep = counts >= options.min_class_images
    labels = np.cumsum(keep) - 1
    kept = tuple(name for name, good in zip(classes, keep, strict=True) if good)
    return kept, labels, ~keep[label] & (fates <= VAL)


def _require_unique_keys(catalogue: Catalogue, rows: np.ndarray) -> None:
    """Equal keys have equal ranks and so are neighbours.

    Raises:
        UserError: two images share a key.
    """
    ranks = catalogue.records["rank"][rows]
    for place in np.flatnonzero(ranks[1:] == ranks[:-1]):
        one, other = (catalogue.texts(int(rows[place + step])) for step in (0, 1))
        if one[0] == other[0]:
            raise UserError(f"{one[1]} and {other[1]} would share the key {one[0]}: rename one")
