"""From paths to units of work: what kind of source each path is, by looking inside."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_prep import archives, imagenet1k
from data_prep.options import Options
from data_prep.records import Workspace
from data_prep.staging import stage
from l2vit import files
from l2vit.errors import UserError

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_FLAT_UNIT = 1000
_VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One image of a flat archive."""

    name: str
    offset: int
    size: int
    class_id: str


@dataclass(frozen=True)
class Unit:
    """A piece of the source that one worker goes through in one go."""

    number: int
    kind: str
    """``tar``: one class's archive, perhaps inside another; ``folder``; ``flat``: listed images."""
    path: str
    label: str
    """The source as users know it, for messages and records."""
    class_id: str = ""
    offset: int = 0
    size: int = 0
    split: str = ""
    """``train`` or ``val`` where the source itself says so."""
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Raw:
    """One member as found."""

    name: str
    offset: int
    size: int
    class_id: str
    data: bytes = b""
    problem: str = ""


class _Listing:
    def __init__(self, options: Options, workspace: Workspace) -> None:
        self.options, self.workspace = options, workspace
        self.units: list[Unit] = []
        self.classes: set[str] = set()
        self.validation: list[tuple[Path, str]] = []
        self.truth = imagenet1k.Truth()

    def add(self, **values: object) -> None:
        unit = Unit(number=len(self.units), **values)  # type: ignore[arg-type]
        self.units.append(unit)
        if unit.class_id:
            self.classes.add(unit.class_id)

    def path(self, path: Path, split: str = "") -> None:
        if not path.exists():
            raise UserError(f"source not found: {path}")
        if imagenet1k.is_devkit(path):
            self.truth.read(path)
        elif path.is_dir():
            self.directory(path, split)
        else:
            self.archive(path, str(path), split)

    def directory(self, path: Path, split: str) -> None:
        entries = sorted(path.iterdir())
        tars = [e for e in entries if e.is_file() and e.name.endswith(_TAR_SUFFIXES)]
        folders = [e for e in entries if e.is_dir() and not e.name.startswith(".")]
        kits = [e for e in (*tars, *folders) if imagenet1k.is_devkit(e)]
        for kit in kits:
            self.truth.read(kit)
        folders = [e for e in folders if e not in kits]
        tars = [e for e in tars if e not in kits]
        parts = {"train", "val", "validation"}
        if folders and {folder.name.lower() for folder in folders} <= parts:
            for folder in folders:
                self.directory(folder, "train" if folder.name.lower() == "train" else "val")
        elif tars:
            for tar in tars:
                self.archive(tar, str(tar), split)
        elif folders:
            for folder in folders:
                size = sum(item.stat().st_size for item in _images(folder))
                self.add(
                    kind="folder",
                    path=str(folder),
                    label=str(folder),
                    class_id=folder.name,
                    size=size,
                    split=split,
                )
        elif not kits:
            raise UserError(f"{path} holds neither class folders nor tar archives")

    def archive(self, path: Path, label: str, split: str) -> None:
        """A plain or gzip-compressed tar of any of the known kinds."""
        if archives.is_gzip(path):
            for staged, name in stage(path, self.workspace):
                inner = f"{label}/{name}" if name else label
                self.class_tar(staged, inner, Path(name or path.name).name.split(".")[0], split)
            return
        size = path.stat().st_size
        with archives.open_window(path) as stream:
            first = next(archives.members(stream, size, label), None)
        if first is None:
            self.class_tar(path, label, path.name.split(".")[0], split)
        elif first.name.endswith(".tar"):
            self.outer(path, label, split, size)
        elif _VAL_NAME.search(first.name):
            self.validation.append((path, label))
        else:
            self.class_tar(path, label, path.name.split(".")[0], split)

    def outer(self, path: Path, label: str, split: str, size: int) -> None:
        """A tar of class tars: the inner ones are read in place."""
        with archives.open_window(path) as stream:
            for member in archives.members(stream, size, label):
                if member.problem == "cut-short":
                    raise UserError(f"{label} is cut short at {member.name}: download it again")
                if member.problem or not member.name.endswith(".tar"):
                    continue
                self.add(
                    kind="tar",
                    path=str(path),
                    label=f"{label}/{member.name}",
                    class_id=Path(member.name).name.removesuffix(".tar"),
                    offset=member.offset,
                    size=member.size,
                    split=split,
                )

    def class_tar(self, path: Path, label: str, class_id: str, split: str) -> None:
        size = path.stat().st_size
        self.add(kind="tar", path=str(path), label=label, class_id=class_id, size=size, split=split)

    def flat_validation(self) -> None:
        """ILSVRC2012_img_val.tar: classes come from the devkit's ground truth."""
        for path, label in self.validation:
            if not self.truth.known:
                raise UserError(
                    f"{label} needs its ground truth: add ILSVRC2012_devkit_t12.tar.gz to --source,"
                    " or give --val-labels FILE"
                )
            self.classes |= self.truth.classes
            entries = []
            with archives.open_window(path) as stream:
                for member in archives.members(stream, path.stat().st_size, label):
                    if member.problem == "cut-short":
                        raise UserError(f"{label} is cut short at {member.name}: download it again")
                    if not member.problem:
                        wnid = self.truth.wnid(member.name, label)
                        entries.append(Entry(member.name, member.offset, member.size, wnid))
            for start in range(0, len(entries), _FLAT_UNIT):
                chunk = tuple(entries[start : start + _FLAT_UNIT])
                self.add(
                    kind="flat",
                    path=str(path),
                    label=label,
                    size=sum(entry.size for entry in chunk),
                    split="val",
                    entries=chunk,
                )


def save_units(units: list[Unit], found: set[str], workspace: Workspace) -> None:
    """Remember the listing: unit numbers name the parts of pass 1 and must not shift."""
    rows = [asdict(unit) for unit in units]
    files.write_json(workspace.units, {"found": sorted(found), "units": rows})


def load_units(workspace: Workspace) -> tuple[list[Unit], set[str]]:
    """The listing :func:`save_units` wrote."""
    raw = files.read_json(workspace.units, what="listing of the sources")
    units = []
    for row in raw["units"]:
        entries = tuple(Entry(**entry) for entry in row.pop("entries"))
        _, staged, place = row["path"].partition("/.build/staged/")
        if staged:  # the shard directory may have moved since
            row["path"] = str(workspace.root / "staged" / place)
        units.append(Unit(entries=entries, **row))
    return units, set(raw["found"])


def list_units(options: Options, workspace: Workspace) -> tuple[list[Unit], set[str]]:
    """Look into every source path; nothing but tar headers is read (gzip archives are staged).

    Units come sorted by class, so that the result does not depend on the order of the paths.

    Returns:
        The units, and every class identifier seen.

    Raises:
        UserError: a path is missing, unreadable, damaged, or of no known kind.
    """
    listing = _Listing(options, workspace)
    if options.val_labels:
        listing.truth.read(Path(options.val_labels))
    for source in options.sources:
        listing.path(Path(source))
    listing.flat_validation()
    if not listing.units:
        raise UserError(f"no images found in {', '.join(options.sources)}")
    units = _role_units(listing.units, options)
    units.sort(key=lambda unit: (unit.split, unit.class_id, unit.label, unit.number))
    return renumbered(units), listing.classes


def renumbered(units: list[Unit]) -> list[Unit]:
    """Number the units 0, 1, 2 ..."""
    return [replace(unit, number=number) for number, unit in enumerate(units)]


def _role_units(units: list[Unit], options: Options) -> list[Unit]:
    """The units of the part asked for, where the source names its parts.

    What is not named ``val`` beside something that is, is the training part: images of both must
    never meet in one.
    """
    if not any(unit.split for unit in units):
        return units
    units = [replace(unit, split=unit.split or "train") for unit in units]
    if options.val_fraction or options.val_per_class or options.val_first_per_class:
        if any(unit.split == "val" for unit in units):
            raise UserError(
                "the source brings its own validation part: leave that archive or folder out of"
                " --source, or the --val-... option"
            )
        return units
    wanted = ("train", "val") if options.split == "both" else (options.split or "train",)
    for part in wanted:
        if not any(unit.split == part for unit in units):
            raise UserError(f"the sources hold no {part} part")
    return [unit for unit in units if unit.split in wanted]


def _images(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                yield path


def read_unit(unit: Unit, max_bytes: int) -> Iterator[Raw]:
    """Every member of a unit with its bytes, in archive order.

    Members that are links, no files, nested archives or above ``max_bytes`` come without bytes
    and with a ``problem``.

    Raises:
        UserError: the source vanished, cannot be read, or is damaged.
    """
    if unit.kind == "folder":
        yield from _read_folder(unit, max_bytes)
        return
    size = None if unit.kind == "flat" else unit.size
    with archives.open_window(Path(unit.path), unit.offset, size) as stream:
        if unit.kind == "flat":
            items = ((e.class_id, archives.Member(e.name, e.offset, e.size)) for e in unit.entries)
        else:
            walk = archives.members(stream, unit.size, unit.label)
            items = ((unit.class_id, member) for member in walk)
        for class_id, member in items:
            yield _read_member(unit, class_id, member, stream, max_bytes)


def _read_member(
    unit: Unit, class_id: str, member: archives.Member, stream: object, max_bytes: int
) -> Raw:
    place = unit.offset + member.offset
    problem = member.problem
    if problem == "cut-short":
        raise archives.Damaged(f"{unit.label} is cut short at {member.name}: download it again")
    if not problem and member.name.endswith(_TAR_SUFFIXES):
        problem = "nested-archive"
    if not problem and member.size > max_bytes:
        problem = "too-many-bytes"
    if problem:
        return Raw(member.name, place, member.size, class_id, problem=problem)
    try:
        stream.seek(member.offset)  # type: ignore[attr-defined]
        data = stream.read(member.size)  # type: ignore[attr-defined]
    except OSError as error:
        raise UserError(f"cannot read {unit.label}/{member.name}: {error.strerror}") from error
    if len(data) != member.size:
        raise archives.Damaged(f"{unit.label} is cut short at {member.name}: download it again")
    return Raw(member.name, place, member.size, class_id, data)


def _read_folder(unit: Unit, max_bytes: int) -> Iterator[Raw]:
    folder = Path(unit.path)
    if not folder.is_dir():
        raise UserError(f"source vanished: {folder}")
    for path in _images(folder):
        name = str(path.relative_to(folder))
        try:
            size = path.stat().st_size
            if size > max_bytes:
                yield Raw(name, 0, size, unit.class_id, problem="too-many-bytes")
                continue
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        yield Raw(name, 0, len(data), unit.class_id, data)
