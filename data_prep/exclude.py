"""The leakage guard: keep given images, and near copies of them, out of the shards."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import itertools
import lzma
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep import archives
from data_prep.clean import Refused, clean, is_image
from data_prep.names import escaped
from data_prep.options import Rules
from l2vit.data.manifest import MANIFEST_NAME, Manifest
from l2vit.errors import UserError

_HEX = re.compile(r"[0-9a-fA-F]{64}")
_MEMBER_LIMIT = 64 << 20
_PAIRS = 1 << 22
_FLAT = 16  # a hash with fewer bits set belongs to a picture without content


@dataclass(frozen=True)
class Guard:
    """The images to keep out, by hash, name and perceptual hash."""

    shas: frozenset[str]
    """SHA-256, hexadecimal, of source bytes or of the bytes that would be written."""
    names: frozenset[str]
    """Keys or member names."""
    phashes: np.ndarray
    """uint64 (images,)."""
    titles: tuple[str, ...]
    """Name of each image in ``phashes``."""

    @property
    def size(self) -> int:
        return max(len(self.shas), len(self.titles)) + len(self.names)


def load_guard(paths: tuple[str, ...], *, near: bool) -> Guard:
    """Read exclusion lists.

    Args:
        paths: each a shard directory, a directory or tar (also of tars, also gzip) of images, or
            a text file of lines that are a SHA-256 or a key or member name.
        near: also compute perceptual hashes (every image is decoded).

    Raises:
        UserError: a path is missing, or holds nothing to exclude.
    """
    shas: set[str] = set()
    names: set[str] = set()
    hashes: list[int] = []
    titles: list[str] = []
    for source in paths:
        path, before = Path(source), len(shas) + len(names)
        if path.is_file() and not tarfile.is_tarfile(path):
            _read_list(path, shas, names)
        else:
            others = 0
            for title, data in _files(path):
                if not is_image(data):
                    others += 1
                    continue
                shas.add(hashlib.sha256(data).hexdigest())
                if near:
                    _add_hash(escaped(title), data, hashes, titles)
            if others:
                print(f"--exclude {path}: {others:,} files are no images", flush=True)
        if len(shas) + len(names) == before:
            raise UserError(f"--exclude {path} holds no image, hash or name to exclude")
    return Guard(frozenset(shas), frozenset(names), np.array(hashes, np.uint64), tuple(titles))


def _add_hash(title: str, data: bytes, hashes: list[int], titles: list[str]) -> None:
    try:
        good = clean(data, Rules(min_side=1, exif="keep", perceptual=True))
    except Refused:
        return  # what does not decode has no near copies; its bytes are excluded all the same
    hashes.append(good.phash)
    titles.append(title)


def _read_list(path: Path, shas: set[str], names: set[str]) -> None:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--exclude {path} cannot be read as text: {error}") from error
    for line in lines:
        words = line.split("#")[0].split()
        if not words:
            continue
        if _HEX.fullmatch(words[0]):
            shas.add(words[0].lower())
        else:
            names.add(words[0])


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of a shard directory, a directory, or a tar, whatever its name."""
    if not path.exists():
        raise UserError(f"--exclude {path}: not found")
    try:
        if (path / MANIFEST_NAME).is_file():
            for shard in Manifest.load(path).shards:
                for name, data in _tar_files(path / shard.name, 0):
                    if not name.endswith(".cls"):
                        yield name, data
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file() and file.stat().st_size <= _MEMBER_LIMIT:
                    yield str(file), file.read_bytes()
        else:
            yield from _tar_files(path, 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"--exclude {path} cannot be read: {error}") from error


def _tar_files(path: Path, depth: int) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as plain:
        start = plain.read(2)
    openers = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    with openers.get(start, open)(path, "rb") as stream:  # type: ignore[operator]
        size = None if start in openers else path.stat().st_size
        yield from _walk(stream, size, f"--exclude {path}", depth)


def _walk(stream: BinaryIO, size: int | None, what: str, depth: int) -> Iterator[tuple[str, bytes]]:
    for member in archives.members(stream, size, what):
        if member.problem:
            continue
        if member.name.endswith(".tar") and depth:
            inner = io.BufferedReader(archives.Window(stream, member.offset, member.size))
            name = f"{what}/{escaped(member.name)}"
            yield from _walk(inner, member.size, name, depth - 1)  # type: ignore[arg-type]
        elif member.size <= _MEMBER_LIMIT:
            stream.seek(member.offset)
            yield member.name, stream.read(member.size)


def exact_matches(records: np.ndarray, guard: Guard) -> np.ndarray:
    """bool (records,): the bytes written are on the list."""
    listed = np.array(
        sorted((int(sha[:16], 16), int(sha[16:32], 16)) for sha in guard.shas), np.uint64
    ).reshape(-1, 2)
    found = np.zeros(len(records), bool)
    if len(listed):
        for low in _aligned(records["sha_high"], listed):
            found |= low == records["sha_low"]
    return found


def _aligned(high: np.ndarray, listed: np.ndarray) -> Iterator[np.ndarray]:
    """Second halves of the listed hashes whose first half fits; one round per equal first half."""
    start = np.searchsorted(listed[:, 0], high, side="left")
    stop = np.searchsorted(listed[:, 0], high, side="right")
    for step in range(int((stop - start).max(initial=0))):
        place = np.minimum(start + step, len(listed) - 1)
        yield np.where(start + step < stop, listed[place, 1], ~np.uint64(0))


def near_matches(
    hashes: np.ndarray, guard: Guard, distance: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Perceptual hashes within a Hamming distance of a listed one.

    A pair that differs in at most d bits agrees on one of d + 1 blocks of bits, so only pairs
    that share a block are compared.

    Returns:
        int64 rows of ``hashes`` (ascending), int64 the nearest listed image of each, int64 its
        distance.
    """
    best = np.full(len(hashes), distance + 1, np.int64)
    like = np.zeros(len(hashes), np.int64)
    contents = np.flatnonzero(np.bitwise_count(guard.phashes) >= _FLAT)
    edges = np.linspace(0, 64, distance + 2).astype(np.uint64)
    for low, high in itertools.pairwise(edges):
        mask = np.uint64((1 << int(high - low)) - 1)
        listed = (guard.phashes[contents] >> low) & mask
        order = np.argsort(listed, kind="stable")
        listed = listed[order]
        values = (hashes >> low) & mask
        start = np.searchsorted(listed, values, side="left")
        counts = np.searchsorted(listed, values, side="right") - start
        for rows in _batches(counts):
            count = counts[rows]
            who = np.repeat(rows, count)
            step = np.arange(len(who)) - np.repeat(np.cumsum(count) - count, count)
            other = contents[order[start[who] + step]]
            apart = np.bitwise_count(hashes[who] ^ guard.phashes[other]).astype(np.int64)
            close = np.flatnonzero(apart <= distance)
            for place in close:  # few: only true matches come here
                row = who[place]
                if (apart[place], other[place]) < (best[row], like[row]):
                    best[row], like[row] = apart[place], other[place]
    rows = np.flatnonzero(best <= distance)
    return rows, like[rows], best[rows]


def _batches(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Rows with candidates, in runs of a few million pairs."""
    rows = np.flatnonzero(counts)
    ends = np.cumsum(counts[rows])
    start = 0
    while start < len(rows):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _PAIRS, side="right")))
        yield rows[start:stop]
        start = stop
