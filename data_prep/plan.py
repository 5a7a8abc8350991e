"""Between the passes: duplicates, exclusions, the split, the global shuffle, the shard bounds.

The shuffle sorts by a hash of each sample's key. That is a uniform random permutation which no
worker count, file order or restart can change. Records are sorted on disk, some two million at a
time, so that memory grows by a few bytes an image only.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from data_prep.catalogue import Catalogue, make_keys_unique, merge_results, sorted_by_rank
from data_prep.duplicates import find_duplicates
from data_prep.exclude import Guard, exact_matches, load_guard, near_matches
from data_prep.names import escaped
from data_prep.options import Options
from data_prep.records import FORMS, RECORD, Workspace, key_salt
from data_prep.shards import END, sample_bytes
from data_prep.sources import Unit
from data_prep.spill import Spill
from l2vit import files
from l2vit.errors import UserError

FATES = ("train", "val", "duplicate", "excluded", "class-too-small", "other-part", "test")
TRAIN, VAL, DUPLICATE, EXCLUDED, SMALL, OTHER, TEST = range(len(FATES))
PARTS = {"train": TRAIN, "val": VAL, "test": TEST}
_IS_PART = np.isin(np.arange(len(FATES)), list(PARTS.values()))


@dataclass
class Plan:
    """What the second pass will write."""

    classes: tuple[str, ...]
    shards: dict[str, int]
    """Shards of each part."""
    about: dict[str, dict[str, Any]]
    """Of each part: class_counts, source_formats; members_seen and fates of where it comes from."""
    cross_class_duplicates: int
    notes: dict[str, Any] = field(default_factory=dict)


class _Decisions:
    """What becomes of each image, and the lines about it in ``dropped.jsonl``."""

    def __init__(
        self, catalogue: Catalogue, units: Sequence[Unit], fates: np.ndarray, lines: BinaryIO
    ) -> None:
        self.catalogue, self.units, self._lines = catalogue, units, lines
        self.fates = fates
        """uint8 (rows,): index into FATES."""
        self.reasons: Counter[str] = Counter()

    def note(self, kind: str, row: int, reason: str, detail: str) -> None:
        """Write a line about an image."""
        self.reasons[reason] += 1
        event = _event(kind, self.catalogue, self.units, row, reason, detail)
        self._lines.write(json.dumps(event, ensure_ascii=False).encode() + b"\n")

    def drop(self, row: int, fate: int, reason: str, detail: str) -> None:
        """Leave an image out."""
        self.fates[row] = fate
        self.note("rejected", row, reason, detail)

    def alive(self, start: int, stop: int) -> np.ndarray:
        """bool (stop - start,): images of some part among these rows."""
        return _IS_PART[self.fates[start:stop]]


def make_plan(
    options: Options,
    workspace: Workspace,
    units: Sequence[Unit],
    classes: tuple[str, ...],
    parts: tuple[str, ...],
) -> Plan:
    """Decide the fate of every good image and where each kept one goes; write it down.

    Raises:
        UserError: nothing is left to write, or a part that was asked for would be empty.
    """
    guard = (
        load_guard(options.exclude, near=options.exclude_distance > 0) if options.exclude else None
    )
    catalogue = merge_results(workspace, units, guard.shas if guard else frozenset())
    by_rank = sorted_by_rank(catalogue, workspace.scratch / "rank")
    make_keys_unique(catalogue, by_rank, workspace.text)
    with files.atomic_writer(workspace.dropped) as lines:
        decisions = _Decisions(catalogue, units, split_fates(catalogue, options, units), lines)
        notes = {}
        if guard is not None:
            notes["leakage_guard"] = _exclude(decisions, guard, options.exclude_distance)
        _drop_duplicates(decisions, workspace)
    classes, labels = _keep_classes(decisions, classes, options)
    for fate in set(PARTS.values()) - {PARTS[part] for part in parts}:
        decisions.fates[decisions.fates == fate] = OTHER
    about = _write_orders(decisions, by_rank, workspace, parts, labels, options, len(classes))
    by_rank.delete()
    shards = {part: about[part].pop("shards") for part in parts}
    for part, counts in _source_counts(decisions, options, parts).items():
        about[part].update(counts)
    plan = Plan(classes, shards, about, decisions.reasons["duplicate-across-classes"], notes)
    with files.atomic_writer(workspace.fate) as stream:
        np.save(stream, decisions.fates)
    files.write_json(workspace.plan, plan.__dict__)
    return plan


def load_plan(workspace: Workspace) -> Plan | None:
    """The plan a former call wrote; None if another version of this program wrote it."""
    raw = files.read_json(workspace.plan, what="plan")
    try:
        return Plan(**{**raw, "classes": tuple(raw["classes"])})
    except TypeError:
        return None


def split_fates(catalogue: Catalogue, options: Options, units: Sequence[Unit]) -> np.ndarray:
    """uint8 (rows,): TRAIN, VAL or TEST for each image, by its source's part or the split rule."""
    roles = np.array([PARTS[unit.split or "train"] for unit in units], np.uint8)
    if options.split == "val" and not options.has_val_rule:
        roles[:] = VAL
    fates = np.zeros(len(catalogue), np.uint8)
    best = _LowestOfClass(options.val_per_class or options.val_first_per_class)
    for start, records in catalogue.chunks():
        fate = roles[records["unit"]]
        train = np.flatnonzero(fate == TRAIN)
        if options.val_first_per_class:
            best.add(records["label"][train], train + start, train + start)
        elif options.val_fraction or options.val_per_class:
            scores = _split_scores(catalogue, start, records, options.seed)[train]
            if options.val_fraction:
                fate[train[scores < np.uint64(int(options.val_fraction * 2**64))]] = VAL
            else:
                best.add(records["label"][train], scores, train + start)
        fates[start : start + len(records)] = fate
    fates[best.rows] = VAL
    return fates


def _split_scores(catalogue: Catalogue, start: int, records: np.ndarray, seed: int) -> np.ndarray:
    """uint64 (records,): ``key_hash(seed, "split", key)`` of each key."""
    salt, blake = key_salt(seed, "split"), hashlib.blake2b
    digests = b"".join(
        blake(text[: text.index(b"\t")], digest_size=8, key=salt).digest()
        for text in catalogue.raw_texts(start, records)
    )
    return np.frombuffer(digests, "<u8")


class _LowestOfClass:
    """The ``count`` images of each class that have the lowest scores; the earlier of equals."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._labels = self.rows = np.zeros(0, np.int64)
        self._scores = np.zeros(0, np.uint64)

    def add(self, labels: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
        """Consider more images; ``rows`` come in ascending order."""
        labels = np.concatenate([self._labels, labels])
        scores = np.concatenate([self._scores, scores.astype(np.uint64)])
        rows = np.concatenate([self.rows, rows])
        order = np.lexsort((scores, labels))
        labels = labels[order]
        starts = np.searchsorted(labels, labels, side="left")
        low = np.arange(len(order)) - starts < self._count
        kept = order[low]
        self._labels, self._scores, self.rows = labels[low], scores[kept], rows[kept]


class _Bounds:
    """Where shards begin: as many samples in each as its bytes and its count allow."""

    def __init__(self, options: Options) -> None:
        self._limit = options.shard_bytes - END
        self._most = options.shard_samples or 1 << 62
        self._bounds, self._total = [0], 0
        self._bytes = self._count = 0

    def add(self, sizes: np.ndarray) -> None:
        """Place more samples, whose images have ``sizes`` bytes."""
        ends = np.cumsum(sample_bytes(sizes))
        place = 0
        while place < len(sizes):
            before = int(ends[place - 1]) if place else 0
            room = before + self._limit - self._bytes
            stop = int(np.searchsorted(ends, room, side="right"))
            stop = min(stop, place + self._most - self._count)
            if stop <= place and self._count:
                self._bounds.append(self._total + place)
                self._bytes = self._count = 0
                continue
            stop = max(stop, place + 1)  # an image larger than a shard has one of its own
            self._bytes += int(ends[stop - 1]) - before
            self._count += stop - place
            place = stop
        self._total += len(sizes)

    def finish(self) -> np.ndarray:
        """int64 (shards + 1,): first sample of each shard, then the total."""
        end = [self._total] if self._total else []
        return np.array([*self._bounds, *end], np.int64)


def shard_bounds(sizes: np.ndarray, options: Options) -> np.ndarray:
    """int64 (shards + 1,): first sample of each shard; greedy within bytes and samples allowed."""
    bounds = _Bounds(options)
    bounds.add(sizes)
    return bounds.finish()


class _PartWriter:
    """One part's records, in the order they will be written."""

    def __init__(self, stream: BinaryIO, count: int, options: Options, classes: int) -> None:
        header = {"descr": RECORD.descr, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(stream, header)
        self._stream = stream
        self.bounds = _Bounds(options)
        self.class_counts = np.zeros(classes, np.int64)
        self.forms = np.zeros(len(FORMS), np.int64)

    def add(self, records: np.ndarray, labels: np.ndarray) -> None:
        """Append records, with their final labels."""
        records["label"] = labels[records["label"]]
        self._stream.write(records.tobytes())
        self.bounds.add(records["size"])
        self.class_counts += np.bincount(records["label"], minlength=len(self.class_counts))
        self.forms += np.bincount(records["form"], minlength=len(FORMS))


def _write_orders(
    decisions: _Decisions,
    by_rank: Spill,
    workspace: Workspace,
    parts: tuple[str, ...],
    labels: np.ndarray,
    options: Options,
    classes: int,
) -> dict[str, dict[str, Any]]:
    """Write each part's records in the order of the shuffle, and its shards' bounds."""
    catalogue, fates = decisions.catalogue, decisions.fates
    counts = {part: int(np.count_nonzero(fates == PARTS[part])) for part in parts}
    for part, count in counts.items():
        if not count:
            raise UserError(f"no image is left for the {part} part; see rejected.jsonl's reasons")
    with ExitStack() as stack:
        writers = {}
        for part, count in counts.items():
            stream = stack.enter_context(files.atomic_writer(workspace.order(part)))
            writers[part] = _PartWriter(stream, count, options, classes)
        for run in by_rank.runs():
            catalogue.rename(run)
            fate = fates[catalogue.rows(run)]
            for part, writer in writers.items():
                writer.add(run[fate == PARTS[part]], labels)
    about: dict[str, dict[str, Any]] = {}
    for part, writer in writers.items():
        bounds = writer.bounds.finish()
        with files.atomic_writer(workspace.bounds(part)) as stream:
            np.save(stream, bounds)
        forms = {FORMS[i]: int(n) for i, n in enumerate(writer.forms) if n}
        class_counts = writer.class_counts.tolist()
        about[part] = {
            "shards": len(bounds) - 1,
            "class_counts": class_counts,
            "source_formats": forms,
        }
    return about


def _source_counts(
    decisions: _Decisions, options: Options, parts: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Members looked at and fates of the good ones, in the part of the source each part is from."""
    splits = [unit.split for unit in decisions.units]
    names = sorted(set(splits))
    roles = np.array([names.index(split) for split in splits])
    table = np.zeros((len(names), len(FATES)), np.int64)
    starts = decisions.catalogue.starts
    for number, role in enumerate(roles.tolist()):
        fates = decisions.fates[starts[number] : starts[number + 1]]
        table[role] += np.bincount(fates, minlength=len(FATES))
    counts = {}
    for part in parts:
        own = [names.index(part)] if part in names else list(range(len(names)))
        if part not in names and "train" in names:
            own = [names.index("train")]
        fates = table[own].sum(axis=0)
        seen = sum(
            n for n, role in zip(decisions.catalogue.seen, roles, strict=True) if role in own
        )
        named = {FATES[i]: int(n) for i, n in enumerate(fates) if n}
        counts[part] = {"members_seen": int(seen), "fates": named}
    return counts


def _drop_duplicates(decisions: _Decisions, workspace: Workspace) -> None:
    whole = np.array([unit.split in ("val", "test") for unit in decisions.units])
    catalogue = decisions.catalogue
    found = find_duplicates(catalogue, decisions.alive, whole, workspace.scratch / "hashes")
    for row, first in found.dropped.tolist():
        like = f"same bytes as {catalogue.texts(first)[0]}"
        decisions.drop(row, DUPLICATE, "duplicate", like)
    for row, first in found.kept.tolist():
        like = f"same bytes as {catalogue.texts(first)[0]}"
        decisions.note("note", row, "duplicate-kept", like)
    for one, other in found.crossing.tolist():
        like = f"same bytes as {catalogue.texts(one)[0]}"
        decisions.note("note", other, "duplicate-across-classes", like)


def _exclude(decisions: _Decisions, guard: Guard, distance: int) -> dict[str, Any]:
    """Leave out what is on the exclusion list, and near copies of it."""
    catalogue, before = decisions.catalogue, Counter(decisions.reasons)
    listed = np.array(sorted(catalogue.listed_sources), np.int64)
    for start, records in catalogue.chunks():
        found = exact_matches(records, guard)
        first, last = np.searchsorted(listed, [start, start + len(records)])
        found[listed[first:last] - start] = True
        if guard.names:
            found |= _named(catalogue, start, records, guard.names)
        for row in np.flatnonzero(found).tolist():
            decisions.drop(start + row, EXCLUDED, "excluded-exact", "on the exclusion list")
    for start, records in catalogue.chunks() if distance else ():
        rows, like, apart = near_matches(records["phash"], guard, distance)
        for row, other, bits in zip(rows.tolist(), like.tolist(), apart.tolist(), strict=True):
            if decisions.fates[start + row] != EXCLUDED:
                detail = f"{bits} bits from {guard.titles[other]}"
                decisions.drop(start + row, EXCLUDED, "excluded-near", detail)
    return {"listed": guard.size, "distance": distance, **(decisions.reasons - before)}


def _named(
    catalogue: Catalogue, start: int, records: np.ndarray, names: frozenset[str]
) -> np.ndarray:
    """bool (records,): the key or the member's name is listed."""
    raw = {name.encode("utf-8", "surrogateescape") for name in names}
    texts = catalogue.raw_texts(start, records)
    return np.array([not raw.isdisjoint(text.split(b"\t", 1)) for text in texts], bool)


def _event(
    kind: str, catalogue: Catalogue, units: Sequence[Unit], row: int, reason: str, detail: str
) -> dict[str, Any]:
    record = catalogue.record(row)
    unit = units[record["unit"]]
    key, member = catalogue.texts(row)
    return {
        "kind": kind,
        "source": unit.label,
        "member": escaped(member),
        "key": key,
        "label": int(record["label"]),
        "split": unit.split,
        "reason": reason,
        "detail": detail,
        "bytes": int(record["size"]),
        "sha256": f"{record['sha_high']:016x}{record['sha_low']:016x}",
    }


def _keep_classes(
    decisions: _Decisions, classes: tuple[str, ...], options: Options
) -> tuple[tuple[str, ...], np.ndarray]:
    """Drop classes below the minimum.

    Returns:
        The classes left, and int64 new label of each old one.
    """
    if not options.min_class_images:
        return classes, np.arange(len(classes))
    counts = np.zeros(len(classes), np.int64)
    for start, records in decisions.catalogue.chunks():
        alive = decisions.alive(start, start + len(records))
        counts += np.bincount(records["label"][alive], minlength=len(classes))
    keep = counts >= options.min_class_images
    for start, records in decisions.catalogue.chunks():
        fates = decisions.fates[start : start + len(records)]
        fates[~keep[records["label"]] & _IS_PART[fates]] = SMALL
    kept = tuple(name for name, good in zip(classes, keep, strict=True) if good)
    return kept, np.cumsum(keep) - 1
