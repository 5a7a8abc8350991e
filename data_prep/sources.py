"""What each source path is, found by looking inside, and the images in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_prep import archives
from data_prep.names import escaped
from data_prep.options import Options
from data_prep.records import Workspace
from l2vit import files
from l2vit.errors import UserError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


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
    """``train``, ``val`` or ``test`` where the source itself says so."""
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A file that belongs to no class and is not read; it gets a line in ``rejected.jsonl``."""

    source: str
    member: str
    reason: str
    size: int = 0
    split: str = ""


@dataclass(frozen=True)
class Raw:
    """One member as found."""

    name: str
    offset: int
    size: int
    class_id: str
    data: bytes = b""
    problem: str = ""


@dataclass(frozen=True)
class Listing:
    """What the sources hold."""

    units: list[Unit]
    classes: set[str]
    """Every class identifier seen."""
    left_out: list[LeftOut]
    notes: list[str]
    """What was understood of the sources, one line each."""

    def save(self, workspace: Workspace) -> None:
        """Remember it: unit numbers name the results of pass 1 and must not shift."""
        record = {
            "found": sorted(self.classes),
            "units": [asdict(unit) for unit in self.units],
            "left_out": [asdict(left) for left in self.left_out],
            "notes": self.notes,
        }
        files.write_json(workspace.units, record)

    @classmethod
    def load(cls, workspace: Workspace) -> Listing:
        """What :meth:`save` wrote."""
        raw = files.read_json(workspace.units, what="listing of the sources")
        units = []
        for row in raw["units"]:
            entries = tuple(Entry(**entry) for entry in row.pop("entries"))
            _, staged, place = row["path"].partition("/.build/staged/")
            if staged:  # the shard directory may have moved since
                row["path"] = str(workspace.root / "staged" / place)
            units.append(Unit(entries=entries, **row))
        left_out = [LeftOut(**row) for row in raw.get("left_out", ())]
        return cls(units, set(raw["found"]), left_out, raw.get("notes", []))


def renumbered(units: list[Unit]) -> list[Unit]:
    """Number the units 0, 1, 2 ..."""
    return [replace(unit, number=number) for number, unit in enumerate(units)]


def units_of_parts(units: list[Unit], options: Options) -> tuple[list[Unit], tuple[str, ...]]:
    """Choose the units of the parts asked for, where the source names its parts.

    What is not named ``val`` beside something that is, is the training part: images of both must
    never meet in one.

    Returns:
        The units, and the parts that will be written.
    """
    named = {unit.split for unit in units} - {""}
    parts = options.parts(named)
    if not named:
        return units, parts
    units = [replace(unit, split=unit.split or "train") for unit in units]
    if options.has_val_rule and "val" in named:
        raise UserError(
            "the source brings its own validation part: leave that archive or folder out of"
            " --source, or the --val-... option"
        )
    wanted = {"train"} | (set(parts) - {"val"}) if options.val_by_rule(named) else set(parts)
    for part in sorted(wanted):
        if not any(unit.split == part for unit in units):
            raise UserError(f"the sources hold no {part} part")
    return [unit for unit in units if unit.split in wanted], parts


def walk_folder(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file below a class folder, and why it cannot be an image (empty if it may be one).

    Raises:
        UserError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise UserError(f"cannot read {escaped(str(error.filename))}: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=stop):
        links = [name for name in folders if Path(root, name).is_symlink()]
        folders[:] = sorted(set(folders) - set(links))
        for name in sorted([*names, *links]):
            path = Path(root, name)
            yield path, _file_problem(path)


def _file_problem(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "link"  # that leads nowhere
    if stat.S_ISDIR(mode):
        return "link"
    if not stat.S_ISREG(mode):
        return "not-a-file"
    return "nested-archive" if path.name.endswith(TAR_SUFFIXES) else ""


def read_unit(unit: Unit, max_bytes: int) -> Iterator[Raw]:
    """Every member of a unit with its bytes, in archive order.

    Members that are links, no files, nested archives or above ``max_bytes`` come without bytes
    and with a ``problem``.

    Raises:
        Damaged: the archive's structure is broken.
        UserError: the source vanished or cannot be read.
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
    if not problem and member.name.endswith(TAR_SUFFIXES):
        problem = "nested-archive"
    if not problem and member.size > max_bytes:
        problem = "too-many-bytes"
    if problem:
        return Raw(member.name, place, member.size, class_id, problem=problem)
    name = f"{unit.label}/{escaped(member.name)}"
    try:
        stream.seek(member.offset)  # type: ignore[attr-defined]
        data = stream.read(member.size)  # type: ignore[attr-defined]
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    if len(data) != member.size:
        raise archives.Damaged(f"{name} is cut short: download it again", 1)
    return Raw(member.name, place, member.size, class_id, data)


def _read_folder(unit: Unit, max_bytes: int) -> Iterator[Raw]:
    folder = Path(unit.path)
    if not folder.is_dir():
        raise UserError(f"source vanished: {unit.label}")
    for path, problem in walk_folder(folder):
        name = str(path.relative_to(folder))
        if problem:
            yield Raw(name, 0, 0, unit.class_id, problem=problem)
            continue
        try:
            size = path.stat().st_size
            if size > max_bytes:
                yield Raw(name, 0, size, unit.class_id, problem="too-many-bytes")
                continue
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {escaped(str(path))}: {error.strerror}") from error
        yield Raw(name, 0, len(data), unit.class_id, data)
