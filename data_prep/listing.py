"""From source paths to units of work: archives, class folders, parts, and what belongs to none."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from data_prep import archives, imagenet1k
from data_prep.names import escaped, is_hidden
from data_prep.options import Options
from data_prep.records import Workspace
from data_prep.sources import (
    TAR_SUFFIXES,
    Entry,
    LeftOut,
    Listing,
    Unit,
    renumbered,
    units_of_parts,
    walk_folder,
)
from data_prep.staging import stage
from l2vit.errors import ConfigError, UserError

PART_FOLDERS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_FLAT_UNIT = 1000
_VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.", re.IGNORECASE)
_SHOWN = 3


def list_sources(options: Options, workspace: Workspace) -> tuple[Listing, tuple[str, ...]]:
    """Look into every source path; nothing but tar headers is read (gzip archives are staged).

    Units come sorted by class, so that the result does not depend on the order of the paths.

    Returns:
        What was found, and the parts that will be written.

    Raises:
        ConfigError: folders of no known arrangement.
        UserError: a path is missing, unreadable, damaged, or of no known kind.
    """
    lister = _Lister(options, workspace)
    if options.val_labels:
        lister.truth.read(Path(options.val_labels))
    for source in options.sources:
        # train/ and val/ given one by one are the parts they are in one directory, too.
        several = len(options.sources) > 1
        lister.path(
            Path(source), PART_FOLDERS.get(Path(source).name.lower(), "") if several else ""
        )
    lister.flat_validation()
    if not lister.units:
        raise UserError(f"no images found in {', '.join(map(escaped, options.sources))}")
    units, parts = units_of_parts(lister.units, options)
    units.sort(key=lambda unit: (unit.split, unit.class_id, unit.label, unit.number))
    notes = [*lister.notes, *_part_notes(lister.units, options, parts)]
    return Listing(renumbered(units), lister.classes, lister.left_out, notes), parts


def _part_notes(units: list[Unit], options: Options, parts: tuple[str, ...]) -> list[str]:
    """What was understood of the source's own parts."""
    classes: dict[str, set[str]] = {}
    for unit in units:
        found = classes.setdefault(unit.split, set())
        found.update(entry.class_id for entry in unit.entries)
        found.update({unit.class_id} - {""})
    named = classes.keys() - {""}
    train = classes.get("train", classes.get("", set())) if named else set()
    notes = []
    for part in sorted(named):
        asked = "" if part in parts or options.val_by_rule(named) else ", not asked for"
        notes.append(f"the source's {part} part: {len(classes[part]):,} classes{asked}")
        if train and (extra := sorted(classes[part] - train)):
            notes.append(f"warning: {part} has classes that train lacks: {_some(extra)}")
    if options.takes_default_rule and options.val_by_rule(named):
        rule = options.resolved(named).split_rule()
        notes.append(f"the source has no val part: 10% of its images become one ({rule})")
    return notes


def _some(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


class _Lister:
    def __init__(self, options: Options, workspace: Workspace) -> None:
        self.options, self.workspace = options, workspace
        self.units: list[Unit] = []
        self.classes: set[str] = set()
        self.left_out: list[LeftOut] = []
        self.notes: list[str] = []
        self.validation: list[tuple[Path, str]] = []
        self.truth = imagenet1k.Truth()

    def add(self, *, label: str, class_id: str = "", **values: object) -> None:
        """Add a unit; names are escaped here, paths are kept as they are."""
        class_id = escaped(class_id)
        unit = Unit(len(self.units), label=escaped(label), class_id=class_id, **values)  # type: ignore[arg-type]
        self.units.append(unit)
        if class_id:
            self.classes.add(class_id)

    def leave(self, source: str, member: str, reason: str, size: int, split: str) -> None:
        """Note a file that is not read."""
        self.left_out.append(LeftOut(escaped(source), escaped(member), reason, size, split))

    def path(self, path: Path, part: str) -> None:
        """Add one source; if it is a directory it is of that part."""
        if not path.exists():
            raise UserError(f"source not found: {escaped(str(path))}")
        if imagenet1k.is_devkit(path):
            self.truth.read(path)
        elif path.is_dir():
            self._part(path, part)
        else:
            self.archive(path, str(path), "")

    def _part(self, folder: Path, part: str) -> None:
        if part == "test" and not any(_contents(folder)[:2]):
            self._unlabelled(folder)
        else:
            self.directory(folder, part)

    def directory(self, path: Path, split: str) -> None:
        """A directory of parts, of class folders, or of tar archives."""
        tars, folders, others = _contents(path)
        kits = [entry for entry in (*tars, *folders) if imagenet1k.is_devkit(entry)]
        for kit in kits:
            self.truth.read(kit)
        tars, folders = ([e for e in group if e not in kits] for group in (tars, folders))
        name = escaped(str(path))
        if tars and folders:
            raise ConfigError(
                f"{name} holds folders ({_names(folders)}) beside archives ({_names(tars)}): give"
                " the ones to read as --source"
            )
        if not split and self._parts(path, folders, others):
            return
        for entry in others:
            reason = "hidden-file" if is_hidden(entry.name) else "outside-classes"
            self.leave(str(path), entry.name, reason, _size(entry), split)
        for tar in tars:
            self.archive(tar, str(tar), split)
        for folder in folders:
            self._class_folder(folder, split)
        if not (tars or folders or kits):
            raise UserError(f"{name} holds neither class folders nor tar archives")

    def _parts(self, path: Path, folders: list[Path], others: list[Path]) -> bool:
        """Go through the parts of an image folder; False where there are none."""
        roles = {f: PART_FOLDERS[f.name.lower()] for f in folders if f.name.lower() in PART_FOLDERS}
        if not roles or len(roles) < len(folders):
            return False
        for role in set(roles.values()):
            same = [folder for folder in roles if roles[folder] == role]
            if len(same) > 1:
                raise ConfigError(f"{escaped(str(path))} holds more than one {role} part:"
                                  f" {_names(same)}")  # fmt: skip
        for entry in others:
            reason = "hidden-file" if is_hidden(entry.name) else "outside-classes"
            self.leave(str(path), entry.name, reason, _size(entry), "")
        for folder, role in roles.items():
            self._part(folder, role)
        return True

    def _unlabelled(self, folder: Path) -> None:
        """A test part without class folders has no labels to write."""
        found = _contents(folder)[2]
        self.notes.append(f"{escaped(str(folder))} has no class folders: left out")
        for entry in found:
            self.leave(str(folder), entry.name, "no-label", _size(entry), "test")

    def _class_folder(self, folder: Path, split: str) -> None:
        if inner := _folders_only(folder):
            raise ConfigError(
                f"{escaped(str(folder))} is no class folder: it holds only folders"
                f" ({_names(inner)}); --source wants class folders of images, or train/, val/"
                " and test/ of such folders and nothing beside them"
            )
        found = [path for path, problem in walk_folder(folder) if not problem]
        if not found:
            self.notes.append(f"warning: {escaped(str(folder))} holds no file")
        size = sum(_size(path) for path in found)
        label = str(folder)
        self.add(
            kind="folder", path=label, label=label, class_id=folder.name, size=size, split=split
        )

    def archive(self, path: Path, label: str, split: str) -> None:
        """A plain or gzip-compressed tar of any of the known kinds."""
        if archives.is_gzip(path):
            for staged, name in stage(path, self.workspace, self._leaver(label, split)):
                inner = f"{label}/{name}" if name else label
                self.class_tar(staged, inner, Path(name or path.name).name.split(".")[0], split)
            return
        size = path.stat().st_size
        with archives.open_window(path) as stream:
            walk = archives.members(stream, size, escaped(label))
            first = next((member for member in walk if not is_hidden(member.name)), None)
        if first is not None and first.name.endswith(".tar"):
            self.outer(path, label, split, size)
        elif first is not None and _VAL_NAME.search(first.name):
            self.validation.append((path, label))
        else:
            self.class_tar(path, label, path.name.split(".")[0], split)

    def _leaver(self, label: str, split: str) -> Callable[[archives.Member], None]:
        def leave(member: archives.Member) -> None:
            reason = "hidden-file" if is_hidden(member.name) else "outside-classes"
            self.leave(label, member.name, member.problem or reason, member.size, split)

        return leave

    def outer(self, path: Path, label: str, split: str, size: int) -> None:
        """A tar of class tars: the inner ones are read in place."""
        leave = self._leaver(label, split)
        with archives.open_window(path) as stream:
            for member in archives.members(stream, size, escaped(label)):
                if member.problem or is_hidden(member.name) or not member.name.endswith(".tar"):
                    leave(member)
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
        """One class's archive."""
        size = path.stat().st_size
        self.add(kind="tar", path=str(path), label=label, class_id=class_id, size=size, split=split)

    def flat_validation(self) -> None:
        """ILSVRC2012_img_val.tar: classes come from the devkit's ground truth."""
        for path, label in self.validation:
            if not self.truth.known:
                raise UserError(
                    f"{escaped(label)} needs its ground truth: add ILSVRC2012_devkit_t12.tar.gz to"
                    " --source, or give --val-labels FILE"
                )
            self.classes |= self.truth.classes
            entries = []
            with archives.open_window(path) as stream:
                for member in archives.members(stream, path.stat().st_size, escaped(label)):
                    if member.problem or is_hidden(member.name):
                        self._leaver(label, "val")(member)
                        continue
                    wnid = self.truth.wnid(member.name, escaped(label))
                    entries.append(Entry(member.name, member.offset, member.size, wnid))
            for start in range(0, len(entries), _FLAT_UNIT):
                chunk = tuple(entries[start : start + _FLAT_UNIT])
                size = sum(entry.size for entry in chunk)
                self.add(
                    kind="flat", path=str(path), label=label, size=size, split="val", entries=chunk
                )


def _contents(path: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Tar archives, folders, and everything else (hidden entries too) of a directory."""
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"cannot read {escaped(str(path))}: {error.strerror}") from error
    tars, folders, others = list[Path](), list[Path](), list[Path]()
    for entry in entries:
        if is_hidden(entry.name):
            others.append(entry)
        elif entry.is_dir():
            folders.append(entry)
        else:
            is_tar = entry.is_file() and entry.name.endswith(TAR_SUFFIXES)
            (tars if is_tar else others).append(entry)
    return tars, folders, others


def _folders_only(path: Path) -> list[Path]:
    """The folders in a directory; empty if it holds anything else that is not hidden."""
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if not entry.is_dir():
                return []
            found.append(Path(entry.path))
    return sorted(found)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _names(paths: list[Path]) -> str:
    return _some([escaped(path.name) for path in paths])
