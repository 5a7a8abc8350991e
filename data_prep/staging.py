"""gzip-compressed archives: their class tars are copied out once, so that they can be sought in."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from data_prep.records import Workspace
from l2vit import files
from l2vit.errors import UserError

_COPY = 4 << 20


def stage(path: Path, workspace: Workspace) -> list[tuple[Path, str]]:
    """Unpack the class tars of ``path`` into the build directory, each complete or absent.

    A global shuffle reads images in another order than they lie in, and a gzip stream cannot be
    sought in: some seekable copy is needed, and the class tars are the smallest honest one.
    Continues where an earlier call was killed.

    Returns:
        (staged file, member name) in archive order; one pair with an empty name where ``path``
        holds images directly.

    Raises:
        UserError: ``path`` is damaged or cut short, or the disk is full.
    """
    record = workspace.root / "staged" / f"{files.sha256_bytes(str(path).encode())[:16]}.json"
    folder = record.with_suffix("")
    if record.exists():
        names = files.read_json(record, what="staging record")
        pairs = [(_staged(folder, index), name) for index, name in enumerate(names)]
        if all(staged.is_file() for staged, _ in pairs):
            return pairs
    folder.mkdir(parents=True, exist_ok=True)
    print(f"staging {path} (gzip cannot be sought in) ...", flush=True)
    try:
        pairs = list(_unpack(path, folder))
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    files.write_json(record, [name for _, name in pairs])
    return pairs


def _staged(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.tar"


def _unpack(path: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    with gzip.open(path) as plain, tarfile.open(fileobj=plain, mode="r|", bufsize=_COPY) as outer:
        index = 0
        for member in outer:
            outer.members.clear()  # type: ignore[attr-defined]
            if not member.isreg():
                continue
            if not member.name.endswith(".tar"):
                break
            target = _staged(folder, index)
            if not (target.is_file() and target.stat().st_size == member.size):
                content = outer.extractfile(member)
                assert content is not None
                with files.atomic_writer(target) as stream:
                    shutil.copyfileobj(content, stream, _COPY)
                if target.stat().st_size != member.size:
                    target.unlink()
                    raise EOFError(f"{member.name} ends early")
            yield target, member.name
            index += 1
        else:
            return
    if index:
        raise UserError(f"{path} mixes class archives and images")
    target = _staged(folder, 0)
    with gzip.open(path) as plain, files.atomic_writer(target) as stream:
        shutil.copyfileobj(plain, stream, _COPY)
    yield target, ""
