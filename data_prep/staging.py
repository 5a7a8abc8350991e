"""gzip-compressed archives: their class tars are copied out once, so that they can be sought in."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

from data_prep import archives
from data_prep.names import escaped, is_hidden
from data_prep.records import Workspace
from l2vit import files
from l2vit.errors import UserError

_COPY = 4 << 20


def stage(
    path: Path, workspace: Workspace, leave: Callable[[archives.Member], None]
) -> list[tuple[Path, str]]:
    """Unpack the class tars of ``path`` into the build directory, each complete or absent.

    The shuffle reads images in another order than they are stored in, and a gzip stream cannot be
    sought in, so a seekable copy is needed. Continues where an earlier call was killed.

    Args:
        path: the gzip file.
        workspace: where copies go.
        leave: told of each member that is no class tar.

    Returns:
        (staged file, member name) in archive order; one pair with an empty name where ``path``
        holds images directly.

    Raises:
        UserError: ``path`` is damaged or cut short, or the disk is full.
    """
    name = files.sha256_bytes(str(path).encode("utf-8", "surrogateescape"))[:16]
    record = workspace.root / "staged" / f"{name}.json"
    folder = record.with_suffix("")
    if record.exists():
        known = files.read_json(record, what="staging record")
        pairs = [(_staged(folder, index), name) for index, name in enumerate(known["names"])]
        if all(staged.is_file() for staged, _ in pairs):
            for values in known["left"]:
                leave(archives.Member(*values))
            return pairs
    folder.mkdir(parents=True, exist_ok=True)
    what = escaped(str(path))
    print(f"staging {what} (gzip cannot be sought in) ...", flush=True)
    left: list[archives.Member] = []
    try:
        pairs = list(_unpack(path, what, folder, left))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{what} is damaged or cut short ({error}): download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {what}: {error.strerror or error}") from error
    for member in left:
        leave(member)
    names = [name for _, name in pairs]
    files.write_json(record, {"names": names, "left": [astuple(member) for member in left]})
    return pairs


def _staged(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.tar"


def _unpack(
    path: Path, what: str, folder: Path, left: list[archives.Member]
) -> Iterator[tuple[Path, str]]:
    index = 0
    with gzip.open(path) as plain:
        for member in archives.members(plain, None, what):  # type: ignore[arg-type]
            if member.problem or is_hidden(member.name) or not member.name.endswith(".tar"):
                if not (index or member.problem or is_hidden(member.name)):
                    break  # an image: the archive is one class's
                left.append(member)
                continue
            target = _staged(folder, index)
            plain.seek(member.offset)
            if not (target.is_file() and target.stat().st_size == member.size):
                with files.atomic_writer(target) as stream:
                    _copy(plain, stream, member.size, escaped(member.name))
            yield target, member.name
            index += 1
    if index:
        return
    left.clear()
    target = _staged(folder, 0)
    with gzip.open(path) as plain, files.atomic_writer(target) as stream:
        _copy(plain, stream)
    yield target, ""


def _copy(source: Any, target: Any, size: int | None = None, what: str = "") -> None:
    left = size
    while chunk := source.read(_COPY if left is None else min(left, _COPY)):
        target.write(chunk)
        if left is not None:
            left -= len(chunk)
    if left:
        raise EOFError(f"{what} ends early")
