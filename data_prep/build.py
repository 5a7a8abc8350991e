"""``build``: list, check, plan, write, and the manifest last. Each step finds its own leftovers."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.gather import gather
from data_prep.options import Options
from data_prep.plan import FATES, Plan, load_plan, make_plan
from data_prep.pool import Progress, parallel_map
from data_prep.records import UnitResult, Workspace
from data_prep.scan import ScanContext, scan_unit
from data_prep.shards import WriteContext, write_info, write_shard
from data_prep.sources import Unit, list_units, load_units, renumbered, save_units
from l2vit import files
from l2vit.data import labels
from l2vit.data.manifest import MANIFEST_NAME, Manifest, Shard
from l2vit.errors import UserError

_LOCK_PATIENCE = 5.0  # seconds
_THUMBNAILS = 12  # per reason, for the report


def build(options: Options) -> dict[str, Manifest]:
    """Turn the sources into finished shard directories; the same call continues a killed one.

    Returns:
        Manifest of each split written.

    Raises:
        UserError: a source, the disk, or an ``--out`` that holds something else.
    """
    options.validate()
    workspace = Workspace(options.out / ".build")
    directories = split_directories(options)
    workspace.create()
    with _locked(workspace):
        _claim(options, workspace)
        if all((path / MANIFEST_NAME).exists() for path in directories.values()):
            print(f"{options.out} is already complete", flush=True)
            return {split: Manifest.load(path) for split, path in directories.items()}
        units, found, release, classes = _list(options, workspace)
        print(
            f"{len(found):,} classes found: release {release}, {len(classes):,} labels,"
            f" {len(units):,} units of work",
            flush=True,
        )
        check_images(options, workspace, units, classes)
        if workspace.plan.exists():
            plan = load_plan(workspace)
        else:
            print("planning the shuffle ...", flush=True)
            plan = make_plan(options, workspace, units, classes)
        if options.gather:
            writing = WriteContext(options, workspace, tuple(units), "", options.out)
            gather(writing, list(directories), options.workers)
        for split, path in directories.items():
            write_split(options, workspace, units, split, path, plan.shards[split])
        manifests = {
            split: finish(options, workspace, units, plan, split, path, release)
            for split, path in directories.items()
        }
        workspace.tidy()
    summary(options, plan, manifests)
    return manifests


def _list(
    options: Options, workspace: Workspace
) -> tuple[list[Unit], set[str], str, tuple[str, ...]]:
    if workspace.units.exists():
        units, found = load_units(workspace)
        return units, found, *choose_classes(options, found)
    units, found = list_units(options, workspace)
    release, classes = choose_classes(options, found)
    wanted = set(classes)
    units = renumbered([u for u in units if not u.class_id or u.class_id in wanted])
    if not units:
        raise UserError(f"none of the {len(found)} classes found is in the class list {release}")
    save_units(units, found, workspace)
    _note_space(options, sum(unit.size for unit in units) * (2 if options.gather else 1))
    return units, found, release, classes


def _note_space(options: Options, needed: int) -> None:
    """Say at once, not after hours, that the disk will not do."""
    free = shutil.disk_usage(options.out).free
    if free < needed:
        print(
            f"note: about {needed / 1e9:,.1f} GB will be written, {free / 1e9:,.1f} GB are free in"
            f" {options.out}",
            flush=True,
        )


def split_directories(options: Options) -> dict[str, Path]:
    """Where each split goes."""
    if options.split == "both":
        return {"train": options.out / "train", "val": options.out / "val"}
    return {options.split or "train": options.out}


class _locked:
    """Only one build at a time may write to a directory."""

    def __init__(self, workspace: Workspace) -> None:
        self._path = workspace.root / "lock"

    def __enter__(self) -> None:
        self._stream = self._path.open("w")
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                # Workers of a killed build hold the lock, too, until they are gone.
                if time.monotonic() > deadline:
                    out = self._path.parent.parent
                    raise UserError(f"another build is at work in {out}") from None
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _claim(options: Options, workspace: Workspace) -> None:
    """Refuse to continue a build that was begun with other options."""
    identity = options.identity()
    if workspace.build.exists():
        before = files.read_json(workspace.build, what="build record")
        changed = sorted(
            k for k in identity if before.get(k) != json.loads(json.dumps(identity[k]))
        )
        if changed:
            raise UserError(
                f"{options.out} was begun with other options ({', '.join(changed)} differ): give"
                " the same ones to continue, or another --out"
            )
        return
    if options.split != "both" and (options.out / MANIFEST_NAME).exists():
        before = Manifest.load(options.out).provenance.get("options")
        if before == json.loads(json.dumps(identity)):
            return
    if any(options.out.glob("shard-*.tar")):
        raise UserError(f"{options.out} holds shards of unknown origin: give an empty --out")
    files.write_json(workspace.build, identity)


def choose_classes(options: Options, found: set[str]) -> tuple[str, tuple[str, ...]]:
    """Name of the release, and the ordered class list labels refer to."""
    if options.classes == "found" or (options.dataset == "folder" and options.classes == "auto"):
        return "custom", tuple(sorted(found))
    if options.classes == "auto":
        release = labels.recognise(found)
        return release.name, release.classes
    if options.classes == "21k-p":
        release = labels.recognise(found)
        name = f"imagenet21k-p-{release.name}"
        if name not in labels.LAYOUTS:
            raise UserError(
                f"--classes 21k-p is defined for fall11 and winter21, this is {release.name}: give"
                " --min-class-images 501 instead"
            )
        return name, labels.class_list(name)
    if options.classes in labels.LAYOUTS:
        return options.classes, labels.class_list(options.classes)
    path = Path(options.classes)
    if path.is_dir():
        return "custom", Manifest.load(path).classes
    if not path.is_file():
        raise UserError(
            f"--classes {options.classes}: neither auto, found, a file, a shard directory, nor one"
            f" of {', '.join(labels.LAYOUTS)}"
        )
    names = tuple(path.read_text().split())
    if not names or len(set(names)) != len(names):
        raise UserError(f"--classes {path}: one class a line, none twice")
    return "custom", names


def check_images(
    options: Options, workspace: Workspace, units: list[Unit], classes: tuple[str, ...]
) -> None:
    """Pass 1 over the units that have no part yet."""
    left = [unit for unit in units if not workspace.unit_result(unit.number).exists()]
    if len(left) < len(units):
        print(f"{len(units) - len(left):,} units were checked before", flush=True)
    scan = ScanContext(options, workspace, {name: row for row, name in enumerate(classes)})
    progress = Progress("check", sum(unit.size for unit in left))
    for unit, seen in parallel_map(scan_unit, scan, left, options.workers):
        progress.add(unit.size, seen)
    progress.finish()


def write_split(
    options: Options,
    workspace: Workspace,
    units: list[Unit],
    split: str,
    directory: Path,
    shards: int,
) -> None:
    """Pass 2 over the shards that are not done yet."""
    directory.mkdir(parents=True, exist_ok=True)
    bounds = np.load(workspace.bounds(split))
    left = [n for n in range(shards) if not _finished(workspace, split, n, directory)]
    if len(left) < shards:
        print(f"{shards - len(left):,} {split} shards were written before", flush=True)
    writing = WriteContext(options, workspace, tuple(units), split, directory)
    progress = Progress(f"write {split}", int(sum(bounds[n + 1] - bounds[n] for n in left)))
    for _, samples in parallel_map(write_shard, writing, left, options.workers):
        progress.add(samples, samples)
    progress.finish()


def _finished(workspace: Workspace, split: str, shard: int, directory: Path) -> bool:
    record = workspace.done(split, shard)
    if not record.exists():
        return False
    done = Shard(**files.read_json(record, what="shard record"))
    tar, index = directory / done.name, directory / done.index_name
    return index.is_file() and tar.is_file() and tar.stat().st_size == done.bytes


def finish(
    options: Options,
    workspace: Workspace,
    units: list[Unit],
    plan: Plan,
    split: str,
    directory: Path,
    release: str,
) -> Manifest:
    """Write the records, ``_info.json``, and the manifest last."""
    shards = tuple(
        Shard(**files.read_json(workspace.done(split, n), what="shard record"))
        for n in range(plan.shards[split])
    )
    reasons = _write_events(workspace, units, split, directory)
    _write_thumbnails(workspace, units)
    order = np.load(workspace.order(split), mmap_mode="r")
    counts = np.bincount(order["label"], minlength=len(plan.classes))
    manifest = Manifest(
        dataset=options.dataset,
        split=split,
        classes=plan.classes,
        class_names=labels.class_names(plan.classes),
        shards=shards,
        class_counts=tuple(map(int, counts)),
        provenance={
            "release": release,
            "options": options.identity(),
            "split_rule": options.split_rule(),
            "build": os.path.relpath(workspace.root, directory),
            "members_seen": plan.seen,
            "source_formats": plan.forms,
            "fates": plan.fates,
            "reasons": reasons,
            "cross_class_duplicates": plan.cross_class_duplicates,
            "versions": {name: version(name) for name in ("pillow", "simplejpeg", "numpy")},
            **plan.notes,
        },
    )
    write_info(manifest, directory)
    manifest.save(directory)
    return manifest


def _write_thumbnails(workspace: Workspace, units: list[Unit]) -> None:
    if workspace.thumbnails.exists():
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for unit in units:
        for event in UnitResult.load(workspace.unit_result(unit.number)).events:
            shelf = found.setdefault(f"{event['kind']}: {event['reason']}", [])
            if event.get("thumbnail") and len(shelf) < _THUMBNAILS:
                shelf.append({name: event[name] for name in ("member", "detail", "thumbnail")})
    files.write_json(workspace.thumbnails, found)


def _write_events(
    workspace: Workspace, units: list[Unit], split: str, directory: Path
) -> dict[str, dict[str, int]]:
    """``rejected.jsonl`` and ``repaired.jsonl`` of one split; counts of each reason."""
    fates = np.load(workspace.fate, mmap_mode="r")
    counts: dict[str, Counter[str]] = {"rejected": Counter(), "repaired": Counter()}
    with (
        files.atomic_writer(directory / "rejected.jsonl") as rejected,
        files.atomic_writer(directory / "repaired.jsonl") as repaired,
    ):
        streams = {"rejected": rejected, "repaired": repaired}
        for event in _events(workspace, units, fates):
            if event.pop("fate", split) != split or event["split"] not in ("", split):
                continue
            kind = event.pop("kind")
            if kind in counts:
                counts[kind][event["reason"]] += 1
            line = json.dumps(event, ensure_ascii=False).encode("utf-8", "backslashreplace")
            streams[kind if kind in streams else "rejected"].write(line + b"\n")
    return {kind: dict(sorted(counter.items())) for kind, counter in counts.items()}


def _events(workspace: Workspace, units: list[Unit], fates: np.ndarray) -> Iterator[dict[str, Any]]:
    start = 0
    for unit in units:
        part = UnitResult.load(workspace.unit_result(unit.number))
        for event in part.events:
            row = event.pop("row")
            event.pop("thumbnail", None)
            if row >= 0:
                event["fate"] = FATES[fates[start + row]]
            yield event
        start += len(part.records)
    with workspace.dropped.open() as stream:
        for line in stream:
            yield json.loads(line)


def summary(options: Options, plan: Plan, manifests: dict[str, Manifest]) -> None:
    """Print what was done, in a few lines."""
    for split, manifest in manifests.items():
        size = sum(shard.bytes for shard in manifest.shards)
        print(
            f"{split}: {manifest.samples:,} images, {len(manifest.classes):,} classes,"
            f" {len(manifest.shards):,} shards, {size / 1e9:,.3f} GB"
            f" in {split_directories(options)[split]}; manifest {manifest.hash[:12]}"
        )
    first = next(iter(manifests.values()))
    for kind, reasons in first.provenance["reasons"].items():
        words = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        print(f"{kind}: {sum(reasons.values()):,}{f' ({words})' if words else ''}")
    if plan.cross_class_duplicates:
        print(f"equal images in different classes: {plan.cross_class_duplicates:,} (kept)")
