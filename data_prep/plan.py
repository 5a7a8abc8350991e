"""Between the passes: duplicates, exclusions, the split, the global shuffle, the shard bounds.

The shuffle sorts by a hash of each sample's key. That is a uniform random permutation which no
worker count, file order or restart can change, and which needs one record (84 bytes) of memory an
image, and three integers while sorting: about 1.7 GB for 14.2 million.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.exclude import Guard, exact_matches, load_guard, near_matches
from data_prep.options import Options
from data_prep.records import RECORD, UnitResult, Workspace, key_hash
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

    def __init__(
        self, records: np.ndarray, text: bytes | np.ndarray, raw_shas: dict[int, str]
    ) -> None:
        self.records, self._text = records, text
        self.raw_shas = raw_shas
        """SHA-256 of the source's bytes, where they differ from those written."""

    def texts(self, row: int) -> tuple[str, str]:
        """(key, member name) of one record."""
        record = self.records[row]
        start = int(record["text_offset"])
        raw = bytes(self._text[start : start + int(record["text_size"])])
        key, _, name = raw.decode("utf-8", "surrogateescape").partition("\t")
        return key, name


def merge_results(
    workspace: Workspace, units: list[Unit], *, hashes: bool = False
) -> tuple[Catalogue, int, dict[str, int]]:
    """Join the parts of all units; ``hashes`` also those of repaired images' source bytes.

    Returns:
        The catalogue, members seen, and images of each source format.
    """
    seen, forms, place, total = 0, Counter[str](), 0, 0
    raw_shas: dict[int, str] = {}
    with (
        files.atomic_writer(workspace.text) as stream,
        files.atomic_writer(workspace.records) as rows,
    ):
        for unit in units:
            part = UnitResult.load(workspace.unit_result(unit.number))
            part.records["text_offset"] += np.uint64(place)
            for event in part.events:
                if hashes and event["row"] >= 0:
                    raw_shas[total + event["row"]] = event["sha256"]
            rows.write(part.records.tobytes())
            total += len(part.records)
            stream.write(part.text)
            place += len(part.text)
            seen += part.seen
            forms.update(part.forms)
    records = np.fromfile(workspace.records, RECORD)
    text = np.memmap(workspace.text, np.uint8, "r") if place else b""
    return Catalogue(records, text, raw_shas), seen, dict(forms)


def duplicates(
    high: np.ndarray, low: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact duplicates by the bytes written.

    Args:
        high: uint64 (images,) first half of each image's hash.
        low: uint64 (images,) second half.
        labels: (images,) class of each.

    Returns:
        int64 rows to drop (a same-class copy lies earlier), int64 rows of the copies kept for
        them, and int64 pairs (n, 2) of equal images whose classes differ.
    """
    order = np.lexsort((labels, low, high))
    first, second = order[:-1], order[1:]
    same = (high[first] == high[second]) & (low[first] == low[second])
    label = labels[first] == labels[second]
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


def make_plan(
    options: Options, workspace: Workspace, units: list[Unit], classes: tuple[str, ...]
) -> Plan:
    """Decide the fate of every good image and where each kept one goes; write it down.

    Raises:
        UserError: nothing is left to write, or a part that was asked for would be empty.
    """
    catalogue, seen, forms = merge_results(workspace, units, hashes=bool(options.exclude))
    records = catalogue.records
    order = np.argsort(records["rank"], kind="stable")
    catalogue = _with_unique_keys(catalogue, order, workspace)
    fates = split_fates(catalogue, options, units)
    guard, excluded = _guard(options), list[dict[str, Any]]()
    if guard is not None:
        excluded = list(_exclude(catalogue, units, fates, guard, options.exclude_distance))
    events = [*excluded, *_drop_duplicates(catalogue, units, fates)]
    crossing = sum(event["kind"] == "note" for event in events)
    classes, labels, small = _keep_classes(records["label"], fates, classes, options)
    fates[small] = SMALL
    wanted = {"": (TRAIN,), "train": (TRAIN,), "val": (VAL,), "both": (TRAIN, VAL)}[options.split]
    fates[(fates <= VAL) & ~np.isin(fates, wanted)] = OTHER
    plan = Plan(classes, {}, {}, seen, forms, {}, crossing)
    for fate in wanted:
        split = FATES[fate]
        rows = order[fates[order] == fate]
        if not len(rows):
            raise UserError(f"no image is left for the {split} part; see rejected.jsonl's reasons")
        bounds = shard_bounds(write_order(catalogue, rows, labels, workspace.order(split)), options)
        with files.atomic_writer(workspace.bounds(split)) as stream:
            np.save(stream, bounds)
        plan.shards[split], plan.samples[split] = len(bounds) - 1, len(rows)
    if guard is not None:
        plan.notes["leakage_guard"] = {
            "listed": guard.size,
            "distance": options.exclude_distance,
            **Counter(event["reason"] for event in excluded),
        }
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
    alive = np.flatnonzero(fates <= VAL)
    keys = (catalogue.records[name][alive] for name in ("sha_high", "sha_low", "label"))
    dropped, kept, crossing = (alive[rows] for rows in duplicates(*keys))
    fates[dropped] = DUPLICATE
    for row, first in sorted(zip(dropped.tolist(), kept.tolist(), strict=True)):
        like = f"same bytes as {catalogue.texts(first)[0]}"
        yield _event("rejected", catalogue, units, row, "duplicate", like)
    for one, other in sorted(crossing.tolist()):
        like = f"same bytes as {catalogue.texts(one)[0]}"
        yield _event("note", catalogue, units, other, "duplicate-across-classes", like)


def _guard(options: Options) -> Guard | None:
    if not options.exclude:
        return None
    return load_guard(options.exclude, near=options.exclude_distance > 0)


def _exclude(
    catalogue: Catalogue, units: list[Unit], fates: np.ndarray, guard: Guard, distance: int
) -> Iterator[dict[str, Any]]:
    found = exact_matches(catalogue.records, guard)
    for row, sha in catalogue.raw_shas.items():
        found[row] |= sha in guard.shas
    if guard.names:
        for row in range(len(found)):
            key, member = catalogue.texts(row)
            found[row] |= key in guard.names or member in guard.names
    for row in np.flatnonzero(found).tolist():
        yield _event("rejected", catalogue, units, row, "excluded-exact", "on the exclusion list")
    fates[found] = EXCLUDED
    if not distance:
        return
    rows, like, apart = near_matches(catalogue.records["phash"], guard, distance)
    for row, other, bits in zip(rows.tolist(), like.tolist(), apart.tolist(), strict=True):
        if not found[row]:
            detail = f"{bits} bits from {guard.titles[other]}"
            yield _event("rejected", catalogue, units, row, "excluded-near", detail)
    fates[rows] = EXCLUDED


def _event(
    kind: str, catalogue: Catalogue, units: list[Unit], row: int, reason: str, detail: str
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
        "detail": detail,
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


def _with_unique_keys(catalogue: Catalogue, order: np.ndarray, workspace: Workspace) -> Catalogue:
    """Give images that would share a key (``x.png`` beside ``x.jpg``) keys of their own.

    Equal keys have equal ranks, so they are neighbours in ``order``; all but the first get a
    suffix made from the name of the member.
    """
    records = catalogue.records
    ranks = records["rank"][order]
    taken: set[str] = set()
    place = workspace.text.stat().st_size
    with workspace.text.open("ab") as stream:
        for at in np.flatnonzero(ranks[1:] == ranks[:-1]):
            one, other = int(order[at]), int(order[at + 1])
            key, member = catalogue.texts(other)
            if key not in taken and catalogue.texts(one)[0] != key:
                continue  # two keys that share 64 bits of hash by chance
            taken.add(key)
            name = f"{records['unit'][other]}:{records['row'][other]}:{member}"
            suffix = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
            text = f"{key}-{suffix}\t{member}".encode("utf-8", "surrogateescape")
            stream.write(text)
            records["text_offset"][other], records["text_size"][other] = place, len(text)
            place += len(text)
    if not taken:
        return catalogue
    return Catalogue(records, np.memmap(workspace.text, np.uint8, "r"), catalogue.raw_shas)
