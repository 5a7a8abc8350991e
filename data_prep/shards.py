"""Pass 2: write one shard from its list of records: the tar, its DALI index, their hashes."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.clean import Refused, clean
from data_prep.options import Options
from data_prep.records import SPOOLED, Workspace
from data_prep.sources import Unit
from l2vit import files
from l2vit.data.manifest import LABEL_WIDTH, Manifest, Shard
from l2vit.data.shards import CHECKSUM_SUFFIX, checksum
from l2vit.errors import UserError

BLOCK = 512
END = 2 * BLOCK  # two zero blocks end a tar
_WINDOW = 64 << 20
_OPEN_FILES = 128


def sample_bytes(sizes: np.ndarray) -> np.ndarray:
    """int64: what a sample with an image of ``sizes`` bytes takes in a shard."""
    return sizes.astype(np.int64) // -BLOCK * -BLOCK + 3 * BLOCK


def shard_name(number: int) -> str:
    """``shard-000000.tar``."""
    return f"shard-{number:06d}.tar"


def tar_header(name: str, size: int) -> bytes:
    """ustar header of a plain file that says nothing of when and by whom it was made."""
    fields = (
        name.encode().ljust(100, b"\0"),
        b"0000644\0",
        b"0000000\0",
        b"0000000\0",
        b"%011o\0" % size,
        b"00000000000\0",
        b"        ",  # the checksum counts itself as spaces
        b"0",
        b"\0" * 100,
        b"ustar\x0000",
    )
    header = b"".join(fields).ljust(BLOCK, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


class _Sources:
    """Open source files, the least recently used closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Raises OSError."""
        if path in self._open:
            self._open.move_to_end(path)
        else:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY)
        return os.pread(self._open[path], size, offset)


@dataclass(frozen=True)
class Writing:
    """What every worker of pass 2 needs to know."""

    options: Options
    workspace: Workspace
    units: tuple[Unit, ...]
    split: str
    directory: Path
    again: bool = False
    """Clean repaired images once more, their spool being gone."""


def shard_records(workspace: Workspace, split: str, shard: int) -> np.ndarray:
    """The shard's records in writing order."""
    bounds = np.load(workspace.bounds(split))
    order = np.load(workspace.order(split), mmap_mode="r")
    return np.array(order[bounds[shard] : bounds[shard + 1]])


def write_shard(writing: Writing, shard: int) -> int:
    """Write shard ``shard`` and its index, complete or absent.

    Returns:
        Samples written.

    Raises:
        UserError: disk full, or a source vanished, changed, or cannot be read.
    """
    records = shard_records(writing.workspace, writing.split, shard)
    tar = writing.directory / shard_name(shard)
    result = write_records(writing, records, tar)
    files.write_json(writing.workspace.done(writing.split, shard), asdict(result))
    return len(records)


def write_records(writing: Writing, records: np.ndarray, tar: Path) -> Shard:
    """Write ``records`` to ``tar``, its index and its samples' checksums beside it."""
    index = [f"v1.2 {len(records)}"]
    extension, digest, place = writing.options.rules.extension, hashlib.sha256(), 0
    sums: list[int] = []
    with ExitStack() as stack:
        sources = stack.enter_context(_Sources())
        names = stack.enter_context(writing.workspace.text.open("rb"))
        stream = stack.enter_context(files.atomic_writer(tar))
        for window in _windows(records):
            texts = [_text(names.fileno(), record) for record in window]
            images = _read_window(writing, sources, window, texts)
            for record, (key, _), image in zip(window, texts, images, strict=True):
                label = b"%0*d" % (LABEL_WIDTH, record["label"])
                pieces = (
                    tar_header(f"{key}.{extension}", len(image)),
                    image,
                    bytes(-len(image) % BLOCK),
                    tar_header(f"{key}.cls", len(label)),
                    label,
                    bytes(-len(label) % BLOCK),
                )
                block = b"".join(pieces)
                second = place + len(block) - BLOCK
                index.append(
                    f"{extension} {place + BLOCK} {len(image)} {key}.{extension}"
                    f" cls {second} {len(label)} {key}.cls"
                )
                place += len(block)
                sums.append(checksum(image, label))
                digest.update(block)
                stream.write(block)
        digest.update(bytes(END))
        stream.write(bytes(END))
    text = "\n".join(index) + "\n"
    files.write_text(tar.with_suffix(".idx"), text)
    files.write_bytes(tar.with_suffix(CHECKSUM_SUFFIX), np.array(sums, "<u4").tobytes())
    return Shard(
        tar.name,
        len(records),
        place + END,
        digest.hexdigest(),
        files.sha256_bytes(text.encode()),
    )


def write_info(manifest: Manifest, directory: Path) -> None:
    """Write ``_info.json``, where timm's webdataset reader looks for splits and shards."""
    split = {
        "name": manifest.split,
        "num_samples": manifest.samples,
        "filenames": [shard.name for shard in manifest.shards],
        "shard_lengths": [shard.samples for shard in manifest.shards],
    }
    files.write_json(directory / "_info.json", {"splits": {manifest.split: split}})


def _windows(records: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of records of up to 64 MiB: read in the order they lie in the sources, and held."""
    ends = np.cumsum(records["size"].astype(np.int64))
    start = 0
    while start < len(records):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _WINDOW, side="right")))
        yield records[start:stop]
        start = stop


def _text(descriptor: int, record: np.void) -> tuple[str, str]:
    raw = os.pread(descriptor, int(record["text_size"]), int(record["text_offset"]))
    key, _, name = raw.decode("utf-8", "surrogateescape").partition("\t")
    return key, name


def _read_window(
    writing: Writing, sources: _Sources, window: np.ndarray, texts: list[tuple[str, str]]
) -> list[bytes]:
    images: list[bytes] = [b""] * len(window)
    for place in np.lexsort((window["raw_offset"], window["unit"])):
        record, unit = window[place], writing.units[window["unit"][place]]
        path, offset, size = unit.path, int(record["raw_offset"]), int(record["raw_size"])
        if unit.kind == "folder":
            path, offset = str(Path(unit.path, texts[place][1])), 0
        spooled = bool(record["flags"] & SPOOLED)
        if spooled and not writing.again:
            path, offset = str(writing.workspace.spool(unit.number)), int(record["offset"])
            size = int(record["size"])
        try:
            image = sources.read(path, offset, size)
            if spooled and writing.again:
                image = clean(image, writing.options.rules).data
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except Refused:
            image = b""  # the hash below tells
        if int.from_bytes(hashlib.sha256(image).digest()[:8], "big") != record["sha_high"]:
            raise UserError(
                f"{path} changed since it was checked (at {texts[place][1]}): start again with an"
                " empty --out"
            )
        images[place] = image
    return images
