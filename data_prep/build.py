"""``build``: list, check, plan, write, and the manifest last. Each step finds its own leftovers."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data_prep.events import Events, print_summary, write_events, write_thumbnails
from data_prep.gather import gather
from data_prep.listing import list_sources
from data_prep.options import Options
from data_prep.plan import Plan, load_plan, make_plan
from data_prep.pool import Progress, parallel_map
from data_prep.records import Workspace
from data_prep.scan import ScanContext, scan_unit
from data_prep.shards import WriteContext, write_info, write_parts_info, write_shard
from data_prep.sources import LeftOut, Listing, Unit, renumbered
from l2vit import files
from l2vit.data import labels
from l2vit.data.manifest import MANIFEST_NAME, Manifest, Shard
from l2vit.errors import UserError

_LOCK_PATIENCE = 5.0  # seconds


@dataclass(frozen=True)
class Work:
    """A build that knows its source."""

    options: Options
    """With the split rule that applies."""
    workspace: Workspace
    units: tuple[Unit, ...]
    left_out: tuple[LeftOut, ...]
    directories: dict[str, Path]
    """Where each part goes."""
    release: str
    classes: tuple[str, ...]


def build(options: Options) -> dict[str, Manifest]:
    """Turn the sources into finished shard directories; the same call continues a killed one.

    Returns:
        Manifest of each part written.

    Raises:
        UserError: a source, the disk, or an ``--out`` that holds something else.
    """
    options.validate()
    workspace = Workspace(options.out / ".build")
    workspace.create()
    with _locked(workspace):
        _claim(options, workspace)
        finished = _finished(options, workspace)
        if finished:
            workspace.tidy()  # the call that wrote the last manifest may have been killed then
            manifests = {part: Manifest.load(path) for part, path in finished.items()}
            _describe_parts(options, finished, manifests)
            print(f"{options.out} is already complete", flush=True)
            return manifests
        work = _list(options, workspace)
        check_images(work)
        plan = _plan(work)
        if options.gather:
            context = WriteContext(options, workspace, work.units, "", options.out)
            gather(context, list(work.directories), options.workers)
        for part in work.directories:
            write_part(work, part, plan.shards[part])
        events = {
            part: write_events(workspace, work.units, work.left_out, part, path)
            for part, path in work.directories.items()
        }
        manifests = {part: finish(work, plan, part, events[part]) for part in work.directories}
        _describe_parts(options, work.directories, manifests)
        workspace.tidy()
    for part, manifest in manifests.items():
        print_summary(manifest, work.directories[part], events[part])
    return manifests


def _describe_parts(
    options: Options, directories: Mapping[str, Path], manifests: Mapping[str, Manifest]
) -> None:
    """Tell timm of all parts at once, where each has a folder of its own in OUT."""
    if all(path == options.out / part for part, path in directories.items()):
        write_parts_info(manifests, options.out)


def _plan(work: Work) -> Plan:
    if work.workspace.plan.exists() and (plan := load_plan(work.workspace)):
        return plan
    print("planning the shuffle ...", flush=True)
    parts = tuple(work.directories)
    return make_plan(work.options, work.workspace, work.units, work.classes, parts)


def _list(options: Options, workspace: Workspace) -> Work:
    """List the sources, or remember how an earlier call listed them."""
    if workspace.units.exists():
        listing = Listing.load(workspace)
        release, classes = choose_classes(options, listing.classes)
    else:
        listing, _ = list_sources(options, workspace)
        release, classes = choose_classes(options, listing.classes)
        listing = _only_listed(listing, classes, release)
        listing.save(workspace)
        size = sum(unit.size for unit in listing.units)
        _note_space(options, size * (2 if options.gather else 1))
    for note in listing.notes:
        print(note, flush=True)
    print(
        f"{len(listing.classes):,} classes found: release {release}, {len(classes):,} labels,"
        f" {len(listing.units):,} units of work",
        flush=True,
    )
    named = {unit.split for unit in listing.units} - {""}
    return Work(
        options.resolved(named),
        workspace,
        tuple(listing.units),
        tuple(listing.left_out),
        part_directories(options, options.parts(named)),
        release,
        classes,
    )


def _only_listed(listing: Listing, classes: tuple[str, ...], release: str) -> Listing:
    """Leave out the classes that have no label."""
    wanted = set(classes)
    units = []
    for unit in listing.units:
        if unit.class_id in wanted:
            units.append(unit)
        elif not unit.class_id:
            entries = tuple(entry for entry in unit.entries if entry.class_id in wanted)
            size = sum(entry.size for entry in entries)
            units += [replace(unit, entries=entries, size=size)] if entries else []
    if not units:
        raise UserError(
            f"none of the {len(listing.classes)} classes found is in the class list {release}"
        )
    notes = list(listing.notes)
    if missing := len(listing.classes - wanted):
        notes.append(f"{missing:,} classes of the source are not in the class list: not read")
    return replace(listing, units=renumbered(units), notes=notes)


def _note_space(options: Options, needed: int) -> None:
    """Say at once, not after hours, that the disk will not do."""
    free = shutil.disk_usage(options.out).free
    if free < needed:
        print(
            f"note: about {needed / 1e9:,.1f} GB will be written, {free / 1e9:,.1f} GB are free in"
            f" {options.out}",
            flush=True,
        )


def part_directories(options: Options, parts: tuple[str, ...]) -> dict[str, Path]:
    """Where each part goes: to OUT if only one can be asked for, else to a directory in it."""
    if options.split == "both" or options.finds_parts:
        return {part: options.out / part for part in parts}
    return dict.fromkeys(parts, options.out)


def _finished(options: Options, workspace: Workspace) -> dict[str, Path]:
    """Directories of a build that is complete; empty if it is not."""
    if workspace.units.exists():
        named = {unit.split for unit in Listing.load(workspace).units} - {""}
    else:  # the build directory was deleted
        named = {"test"} if (options.out / "test" / MANIFEST_NAME).exists() else set()
    directories = part_directories(options, options.parts(named))
    whole = all((path / MANIFEST_NAME).exists() for path in directories.values())
    return directories if whole else {}


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
    if options.finds_parts and any(options.out.glob("shard-*.tar")):
        raise UserError(
            f"{options.out} holds shards itself, from a build of one part: give another --out, or"
            " --split train for one part"
        )
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
    if (options.out / MANIFEST_NAME).exists():
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


def check_images(work: Work) -> None:
    """Pass 1 over the units that have no result yet."""
    units, workspace = work.units, work.workspace
    left = [unit for unit in units if not workspace.unit_result(unit.number).exists()]
    if len(left) < len(units):
        print(f"{len(units) - len(left):,} units were checked before", flush=True)
    labels = {name: row for row, name in enumerate(work.classes)}
    scan = ScanContext(work.options, workspace, labels)
    progress = Progress("check", sum(unit.size for unit in left))
    for unit, seen in parallel_map(scan_unit, scan, left, work.options.workers):
        progress.add(unit.size, seen)
    progress.finish()


def write_part(work: Work, part: str, shards: int) -> None:
    """Pass 2 over the shards that are not done yet."""
    directory, workspace = work.directories[part], work.workspace
    directory.mkdir(parents=True, exist_ok=True)
    bounds = np.load(workspace.bounds(part))
    left = [n for n in range(shards) if not _is_written(workspace, part, n, directory)]
    if len(left) < shards:
        print(f"{shards - len(left):,} {part} shards were written before", flush=True)
    context = WriteContext(work.options, workspace, work.units, part, directory)
    progress = Progress(f"write {part}", int(sum(bounds[n + 1] - bounds[n] for n in left)))
    for _, samples in parallel_map(write_shard, context, left, work.options.workers):
        progress.add(samples, samples)
    progress.finish()


def _is_written(workspace: Workspace, part: str, shard: int, directory: Path) -> bool:
    record = workspace.done(part, shard)
    if not record.exists():
        return False
    done = Shard(**files.read_json(record, what="shard record"))
    tar, index = directory / done.name, directory / done.index_name
    return index.is_file() and tar.is_file() and tar.stat().st_size == done.bytes


def finish(work: Work, plan: Plan, part: str, events: Events) -> Manifest:
    """Write the records, ``_info.json``, and the manifest last."""
    workspace, directory = work.workspace, work.directories[part]
    shards = tuple(
        Shard(**files.read_json(workspace.done(part, n), what="shard record"))
        for n in range(plan.shards[part])
    )
    write_thumbnails(workspace, work.units)
    about = plan.about[part]
    manifest = Manifest(
        dataset=work.options.dataset,
        split=part,
        classes=plan.classes,
        class_names=labels.class_names(plan.classes),
        shards=shards,
        class_counts=tuple(about["class_counts"]),
        provenance={
            "release": work.release,
            "options": work.options.identity(),
            "split_rule": work.options.split_rule(),
            "build": os.path.relpath(workspace.root, directory),
            "members_seen": about["members_seen"],
            "source_formats": about["source_formats"],
            "fates": about["fates"],
            "reasons": events.reasons,
            "cross_class_duplicates": plan.cross_class_duplicates,
            "versions": {name: version(name) for name in ("pillow", "simplejpeg", "numpy")},
            **plan.notes,
        },
    )
    write_info(manifest, directory)
    manifest.save(directory)
    return manifest
