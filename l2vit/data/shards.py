"""Reading single samples out of indexed shards, and refusing those that are not what they were.

A sample is one ``pread`` at the offsets its index line gives. Files are opened when first needed
and never mapped: a shard that vanishes under a mapping would kill the process.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import resource
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from l2vit.data.manifest import LABEL_WIDTH, MANIFEST_NAME, Manifest, ShardNames
from l2vit.data.shard_cache import ShardCache
from l2vit.data.shared_array import SharedArray
from l2vit.data.storage import Source, open_source
from l2vit.errors import UserError

INDEX_VERSION = b"v1.2"
CHECKSUM_SUFFIX = ".crc"
LABELS_SUFFIX = ".lab"
"""Beside a shard: its labels, a little-endian uint32 a sample, so that finding classes is quick."""
_OPEN_SHARDS = 2048
"""Shards kept open at once, where so many may be: a rank reads one a lane."""
_OTHER_FILES = 1024
"""Descriptors left to the rest of the process, evaluation sets and communication included: as many
as it usually has in all. Half of them all where so many are not allowed."""
_NOT_THE_SAMPLES_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_INDEX_BYTES = 256 << 20
"""Memory for indexes, the least recently used dropped: all of ImageNet-22k's, 171 MB, stay."""
_RUN_AHEAD = 16
"""Neighbours asked for with a sample: a lane reads them next."""
_LABEL_FIELDS = re.compile(rb"cls (\d+) %d .*\n" % LABEL_WIDTH)
"""Where a label lies; it takes the rest of the line, so a line gives one at most."""
JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_WEBP_START = b"RIFF"
IMAGE_EXTENSIONS = (b"jpg", b"webp")
"""Extensions of image members."""


class BadSample(Exception):
    """One sample cannot be used; the message says why."""


@dataclass(frozen=True)
class Sample:
    """One image file and its label, as stored."""

    id: int
    image: bytes
    label: int


class _Index:
    """Where the lines of a shard's index lie, and its samples' checksums where there are any.

    Eight bytes a sample: a rank has all shards of a data set under way, in time. The lines
    themselves stay in their file.
    """

    def __init__(self, text: bytes, checksums: np.ndarray | None) -> None:
        lines = np.frombuffer(text, np.uint8)
        self.line_ends = np.flatnonzero(lines == ord("\n")).astype(np.uint32)
        self.checksums = checksums
        self.bytes = self.line_ends.nbytes + (0 if checksums is None else checksums.nbytes)

    def members(self, number: int, descriptor: int) -> dict[bytes, tuple[int, int, bytes]]:
        """Offset, size and name of each member of sample ``number``, by extension."""
        if not 0 <= number < len(self.line_ends) - 1:
            raise BadSample(f"the index has no sample {number}")
        start, stop = self.line_ends[number : number + 2].tolist()
        fields = os.pread(descriptor, stop - start - 1, start + 1).split(b" ")
        try:
            return {
                fields[i]: (int(fields[i + 1]), int(fields[i + 2]), fields[i + 3])
                for i in range(0, len(fields), 4)
            }
        except (ValueError, IndexError):
            raise BadSample(f"malformed index line {number + 2}") from None


class _OpenShard:
    """The descriptors of a tar (unless it is read through a cache) and of its index."""

    def __init__(self, tar: Path | None, lines: int) -> None:
        self.tar, self.lines = -1, lines
        if tar is not None:
            self.tar = os.open(tar, os.O_RDONLY)

    def __del__(self) -> None:
        # the last reader of an evicted shard closes it, in whatever thread that is
        for descriptor in (self.tar, self.lines):
            if descriptor >= 0:
                os.close(descriptor)


class ShardReader:
    """Samples of a shard directory by sample id. Threads may share one reader.

    Picklable and safe to use after a fork: files are opened again where they are needed.
    """

    def __init__(
        self, directory: Path | str, manifest: Manifest, cache: ShardCache | None = None
    ) -> None:
        self._directory = Path(directory)
        self._cache = cache
        self._names = ShardNames(manifest.shards)
        self._classes = len(manifest.classes)
        self._first_ids = SharedArray(manifest.first_ids)
        self._reset()

    def _reset(self) -> None:
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._indexes: OrderedDict[int, _Index] = OrderedDict()
        self._index_bytes = 0
        self._most_open = _may_open(min(_OPEN_SHARDS, len(self._names)))
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        kept = ("_directory", "_names", "_classes", "_first_ids", "_cache")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard number, number in the shard)."""
        firsts = self._first_ids.values
        shard = int(np.searchsorted(firsts, sample_id, side="right")) - 1
        return shard, int(sample_id - firsts[shard])

    @property
    def ahead(self) -> int:
        """Batches that a cache wants to know of ahead; 0 where samples are read directly."""
        return self._cache.window.ahead if self._cache is not None else 0

    def shard_name(self, sample_id: int) -> str:
        return self._names[self.locate(sample_id)[0]]

    def key_of(self, sample_id: int) -> str:
        """The sample's key; ``shard#number`` where the index cannot be read."""
        shard, number = self.locate(sample_id)
        try:
            index = self._index(shard)  # the tar may be the one that is gone
            lines = self._open_index(shard)
            try:
                members = index.members(number, lines)
            finally:
                os.close(lines)
        except (BadSample, OSError):
            return f"{self._names[shard]}#{number}"
        name = next(iter(members.values()))[2]
        return name.rsplit(b".", 1)[0].decode(errors="replace")

    def announce(self, sample_ids: np.ndarray) -> None:
        """Have samples, and their next neighbours, fetched or read ahead soon."""
        if self._cache is not None:
            numbers: dict[int, list[int]] = {}
            for sample_id in sample_ids.tolist():
                shard, number = self.locate(sample_id)
                numbers.setdefault(shard, []).append(number)
            for shard in numbers:
                self._cache.announce(self, shard, numbers[shard])
            return
        for sample_id in sample_ids.tolist():
            shard, number = self.locate(sample_id)
            try:
                index, opened = self._index(shard), self._shard(shard)
                last = min(number + _RUN_AHEAD, len(index.line_ends) - 2)
                start = min(at for at, _, _ in index.members(number, opened.lines).values())
                ends = index.members(last, opened.lines).values()
                stop = max(at + size for at, size, _ in ends)
                os.posix_fadvise(opened.tar, start, stop - start, os.POSIX_FADV_WILLNEED)
            except (BadSample, OSError):
                continue  # reading it will tell

    def read(self, sample_id: int) -> Sample:
        """The image file and label of a sample, as whole and unchanged as can be told cheaply.

        With a checksum file beside the index the bytes of image and label are those that were
        written. Without one the JPEG's ends and header and the label's form are checked.

        Raises:
            BadSample: missing, short, changed or malformed.
            UserError: the process may not open more files, or is out of memory.
        """
        shard, number = self.locate(sample_id)
        try:
            return self._read(shard, number, sample_id)
        except (OSError, BadSample) as error:
            if isinstance(error, BadSample):
                if self._cache is None:
                    raise
                self._cache.drop(shard, number)  # it may have been damaged here
            with self._lock:  # the file may have been replaced: look again
                self._open.pop(shard, None)
                self._forget_index(shard)
            try:
                return self._read(shard, number, sample_id)
            except OSError as error:
                what = f"{error.filename or self._names[shard]}: {error.strerror or error}"
                if error.errno in _NOT_THE_SAMPLES_FAULT:
                    raise UserError(f"cannot read {what}") from None
                raise BadSample(what) from None

    def _read(self, shard: int, number: int, sample_id: int) -> Sample:
        index, opened = self._index(shard), self._shard(shard)
        members = index.members(number, opened.lines)
        try:
            extension = next(name for name in IMAGE_EXTENSIONS if name in members)
            image_at, size, _ = members[extension]
            label_at, label_size, _ = members[b"cls"]
        except (KeyError, StopIteration):
            raise BadSample("the index names no .jpg (or .webp) and .cls for it") from None
        start = min(image_at, label_at)
        stop = max(image_at + size, label_at + label_size)
        if self._cache is None:
            data = os.pread(opened.tar, stop - start, start)
        else:
            data = self._cache.read(self, shard, number, start, stop)
        if len(data) < stop - start:
            raise BadSample("the shard ends before the sample does")
        image = data[image_at - start : image_at - start + size]
        text = data[label_at - start : label_at - start + label_size]
        if index.checksums is not None:
            self._check_sum(index.checksums, number, image, text)
            self._check_contract(text, shard, number)
        else:
            check_frame(image)
        return Sample(sample_id, image, parse_label(text, self._classes))

    def _check_contract(self, text: bytes, shard: int, number: int) -> None:
        """An undamaged label no class answers to is no bad sample: shards and manifest differ."""
        if text.isdigit() and int(text) >= self._classes:
            where = f"{self._directory / self._names[shard]} sample {number}"
            raise UserError(
                f"{where}: label {int(text)} is out of range for the {self._classes} classes of"
                f" {self._directory / MANIFEST_NAME}: they are of different builds; build anew"
            )

    def _check_sum(self, sums: np.ndarray, number: int, image: bytes, label: bytes) -> None:
        if number >= len(sums):
            raise BadSample("the checksum file is shorter than the index")
        if checksum(image, label) != int(sums[number]):
            raise BadSample("checksum differs from the one recorded")

    def _forget_index(self, shard: int) -> None:
        index = self._indexes.pop(shard, None)
        self._index_bytes -= index.bytes if index else 0

    def _index(self, shard: int) -> _Index:
        with self._lock:
            index = self._indexes.get(shard)
            if index is not None:
                self._indexes.move_to_end(shard)
                return index
        path = self._directory / self._names[shard]
        if self._cache is None:
            lines = path.with_suffix(".idx")
            index = _Index(read_index(lines.read_bytes(), lines.name), read_checksums(path))
        else:
            index = _Index(self._cache.index(shard), self._cache.checksums(shard))
        with self._lock:
            if shard in self._indexes:  # another thread was quicker
                return self._indexes[shard]
            self._indexes[shard] = index
            self._index_bytes += index.bytes
            while self._index_bytes > _INDEX_BYTES and len(self._indexes) > 1:
                self._index_bytes -= self._indexes.popitem(last=False)[1].bytes
        return index

    def _open_index(self, shard: int) -> int:
        if self._cache is not None:
            return self._cache.open_index(shard)
        return os.open((self._directory / self._names[shard]).with_suffix(".idx"), os.O_RDONLY)

    def span(self, shard: int, first: int, count: int) -> tuple[int, int]:
        """Where ``count`` samples of a shard lie in its tar: first byte and end.

        Raises:
            BadSample: the index is malformed.
        """
        index, lines = self._index(shard), self._shard(shard).lines
        last = min(first + count, len(index.line_ends) - 1) - 1
        start = min(at for at, _, _ in index.members(first, lines).values())
        stop = max(at + size for at, size, _ in index.members(last, lines).values())
        return start, stop

    def is_checked(self, shard: int) -> bool:
        """Whether a shard has checksums."""
        return self._index(shard).checksums is not None

    def is_sound(self, shard: int, first: int, count: int, start: int, content: bytes) -> bool:
        """Whether samples in ``content``, which begins at byte ``start``, have their checksums."""
        index, lines = self._index(shard), self._shard(shard).lines
        if index.checksums is None:
            return True
        with contextlib.suppress(BadSample, KeyError, StopIteration, IndexError):
            for number in range(first, min(first + count, len(index.line_ends) - 1)):
                members = index.members(number, lines)
                extension = next(name for name in IMAGE_EXTENSIONS if name in members)
                image, label = (
                    content[at - start : at - start + size]
                    for at, size, _ in (members[extension], members[b"cls"])
                )
                if checksum(image, label) != int(index.checksums[number]):
                    return False
            return True
        return False

    def _shard(self, shard: int) -> _OpenShard:
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened
        path = None if self._cache else self._directory / self._names[shard]
        opened = _OpenShard(path, self._open_index(shard))
        with self._lock:
            opened = self._open.setdefault(shard, opened)
            while len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return opened


def _may_open(shards: int) -> int:
    """How many shards a process may keep open, its limit raised for ``shards`` where it can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * shards + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else max(soft, min(wanted, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        shards = min(shards, (soft - min(_OTHER_FILES, soft // 2)) // 2)
    return max(1, shards)


def read_labels(directory: Path | str, manifest: Manifest) -> np.ndarray:
    """(samples,) int32: every label, from the label files, or the shards that have none.

    Raises:
        UserError: a label or a shard cannot be read.
    """
    classes, source = len(manifest.classes), open_source(directory)
    found = np.empty(manifest.samples, np.int32)
    for shard, first in zip(manifest.shards, manifest.first_ids.tolist(), strict=False):
        path = f"{source.address}/{shard.name}"
        try:
            labels = _labels_of(source, shard.name, classes)
        except (BadSample, OSError) as error:
            raise UserError(f"cannot read the labels of {path}: {error}") from None
        if len(labels) != shard.samples or (labels >= classes).any():
            raise UserError(
                f"cannot read the labels of {path}: not {shard.samples} of {classes} classes"
            )
        found[first : first + shard.samples] = labels
    return found


def _labels_of(source: Source, shard: str, classes: int) -> np.ndarray:
    path = Path(shard)
    try:
        return np.frombuffer(source.read(path.with_suffix(LABELS_SUFFIX).name), "<u4")
    except FileNotFoundError:
        index = read_index(source.read(path.with_suffix(".idx").name), shard)
    starts = [int(at) for at in _LABEL_FIELDS.findall(index)]
    texts = [source.read(shard, at, at + LABEL_WIDTH) for at in starts]
    known = _known_labels(classes)
    labels = (known[text] if text in known else parse_label(text, classes) for text in texts)
    return np.fromiter(labels, np.int32, len(texts))


@functools.lru_cache(maxsize=1)
def _known_labels(classes: int) -> dict[bytes, int]:
    return {b"%0*d" % (LABEL_WIDTH, label): label for label in range(classes)}


def read_index(lines: bytes, name: str) -> bytes:
    """The lines of the DALI index ``name``, its heading first.

    Raises:
        BadSample: not an index of version 1.2.
    """
    if not lines.startswith(INDEX_VERSION) or b"\n" not in lines:
        raise BadSample(f"{name} is no DALI index of version 1.2")
    return lines


def parse_label(text: bytes, classes: int) -> int:
    """The label in a ``.cls`` member.

    Raises:
        BadSample: not in the fixed form, or not one of ``classes``.
    """
    if len(text) != LABEL_WIDTH or not text.isdigit():
        raise BadSample(f"label {text[:16]!r} is not {LABEL_WIDTH} digits")
    label = int(text)
    if label >= classes:
        raise BadSample(f"label {label} is not one of {classes} classes")
    return label


def checksum(image: bytes, label: bytes) -> int:
    """What a checksum file records of a sample: CRC-32 (zlib) of the image, then of the label."""
    return zlib.crc32(label, zlib.crc32(image))


def read_checksums(shard: Path) -> np.ndarray | None:
    """(samples,) uint32 of the tar at ``shard``; None where it has no checksum file."""
    path = shard.with_suffix(CHECKSUM_SUFFIX)
    return np.fromfile(path, "<u4") if path.exists() else None


def check_frame(image: bytes) -> None:
    """Check that a file begins and ends like a whole JPEG or WebP; flipped bits go unseen.

    Raises:
        BadSample: neither, or cut off.
    """
    if image.startswith(JPEG_START):
        whole = image[-64:].rfind(_JPEG_END) >= 0
    elif image.startswith(_WEBP_START):
        whole = int.from_bytes(image[4:8], "little") + 8 <= len(image)
    else:
        raise BadSample("neither a JPEG nor a WebP file")
    if not whole:
        raise BadSample("the image file is cut off")


def image_size(image: bytes) -> tuple[int, int]:
    """Height and width in the header of an image file.

    Raises:
        BadSample: no readable header.
    """
    try:
        if image.startswith(JPEG_START):
            height, width, _, _ = simplejpeg.decode_jpeg_header(image)
        else:
            with Image.open(io.BytesIO(image)) as opened:
                width, height = opened.size
    except (ValueError, OSError) as error:
        raise BadSample(f"unreadable image header ({error})") from None
    return height, width
