"""Files that are complete or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from l2vit.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
_CHUNK = 1 << 20


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes ``path`` only if the body succeeds.

    Raises:
        UserError: the disk refused (full, read-only); names ``path``. Nothing is left behind.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, complete or absent."""
    with atomic_writer(path) as stream:
        stream.write(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path``, complete or absent."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline, complete or absent."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    # A file name that is not UTF-8 holds lone surrogates: escaped so, they are read back as such.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def read_json(path: Path, *, what: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or no JSON; names ``path`` and ``what`` it should hold.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from error


def set_aside(path: Path) -> Path:
    """Rename something damaged to ``damaged-NAME-SECONDS`` beside it; the new path."""
    aside = path.with_name(f"damaged-{path.name}-{int(time.time())}")
    path.rename(aside)
    return aside


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
