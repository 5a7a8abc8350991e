"""Pass 2: write one shard from its list of records: the tar, its DALI index, their hashes."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.clean import Refused, clean
from data_prep.names import escaped
from data_prep.options import Options
from data_prep.records import SPOOLED, Workspace
from data_prep.sources import Unit
from l2vit import files
from l2vit.data.manifest import LABEL_WIDTH, Manifest, Shard
from l2vit.data.shards import CHECKSUM_SUFFIX, LABELS_SUFFIX, checksum
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


class SourceFiles:
    """Open source files, the least recently used closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> SourceFiles:
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
class WriteContext:
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


def write_shard(writing: WriteContext, shard: int) -> int:
    """Write shard ``shard`` and its index, complete or absent.

    Returns:
        Samples written.

    Raises:
        UserError: disk full, or a source vanished, changed, or cannot be read.
    """
    records = shard_records(writing.workspace, writing.split, shard)
    tar = writing.directory / shard_name(shard)
    copy = writing.workspace.gathered(writing.split, shard)
    result = write_records(writing, records, tar, copy if copy.exists() else None)
    files.write_json(writing.workspace.done(writing.split, shard), asdict(result))
    copy.unlink(missing_ok=True)
    return len(records)


def write_records(
    writing: WriteContext, records: np.ndarray, tar: Path, copy: Path | None = None
) -> Shard:
    """Write ``records`` to ``tar``; its index, its samples' checksums and labels beside it.

    Args:
        writing: what every worker knows.
        records: (samples,) in the order they are to be written.
        tar: the file to write.
        copy: file of ``gather`` that holds this shard's images, where there is one.
    """
    gathered = _gathered_windows(records, copy)
    index = [f"v1.2 {len(records)}"]
    extension, digest, place = writing.options.rules.extension, hashlib.sha256(), 0
    sums: list[int] = []
    with ExitStack() as stack:
        sources = stack.enter_context(SourceFiles())
        stream = stack.enter_context(files.atomic_writer(tar))
        for span in windows(records):
            window, texts = records[span], read_texts(writing, records[span])
            images = read_window(writing, sources, window, texts, gathered.get(span.start))
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
    files.write_bytes(tar.with_suffix(LABELS_SUFFIX), records["label"].astype("<u4").tobytes())
    return Shard(
        tar.name,
        len(records),
        place + END,
        digest.hexdigest(),
        files.sha256_bytes(text.encode()),
    )


INFO = "_info.json"
_TIMM_NAMES = {"val": "validation"}
"""Parts that timm's scripts call otherwise unless they are told."""


def write_info(manifest: Manifest, directory: Path) -> None:
    """Write ``_info.json``, where timm's webdataset reader looks for splits and shards."""
    files.write_json(directory / INFO, {"splits": {manifest.split: _split_info(manifest, "")}})


def write_parts_info(manifests: Mapping[str, Manifest], directory: Path) -> None:
    """Write ``_info.json`` of a data set whose parts lie in folders named for them.

    timm then takes ``directory`` and any part; val also under timm's name for it, validation.
    """
    splits = {}
    for part, manifest in manifests.items():
        splits[part] = _split_info(manifest, f"{part}/")
        if part in _TIMM_NAMES:
            splits[_TIMM_NAMES[part]] = {**splits[part], "name": _TIMM_NAMES[part]}
    files.write_json(directory / INFO, {"splits": splits})


def _split_info(manifest: Manifest, folder: str) -> dict[str, Any]:
    return {
        "name": manifest.split,
        "num_samples": manifest.samples,
        "filenames": [folder + shard.name for shard in manifest.shards],
        "shard_lengths": [shard.samples for shard in manifest.shards],
    }


def _gathered_windows(records: np.ndarray, copy: Path | None) -> dict[int, list[bytes]]:
    """Images of a gathered shard by the start of their window; empty where there is no copy.

    The file holds them in source order and is read once, front to back.
    """
    if copy is None:
        return {}
    order = np.lexsort((records["row"], records["unit"]))
    ends = np.cumsum(records["size"][order].astype(np.int64))
    try:
        content = memoryview(copy.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {copy}: {error.strerror}") from error
    images: list[bytes] = [b""] * len(records)
    for place, end in zip(order.tolist(), ends.tolist(), strict=True):
        images[place] = bytes(content[end - int(records["size"][place]) : end])
    return {span.start: images[span] for span in windows(records)}


def windows(records: np.ndarray) -> Iterator[slice]:
    """Runs of records of up to 64 MiB: read in the order they lie in the sources, and held."""
    ends = np.cumsum(records["size"].astype(np.int64))
    start = 0
    while start < len(records):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _WINDOW, side="right")))
        yield slice(start, stop)
        start = stop


def read_texts(writing: WriteContext, window: np.ndarray) -> list[tuple[str, str]]:
    """(key, member name) of each record."""
    texts = []
    with writing.workspace.text.open("rb") as names:
        for record in window:
            size, offset = int(record["text_size"]), int(record["text_offset"])
            raw = os.pread(names.fileno(), size, offset).decode("utf-8", "surrogateescape")
            key, _, name = raw.partition("\t")
            texts.append((key, name))
    return texts


def read_window(
    writing: WriteContext,
    sources: SourceFiles,
    window: np.ndarray,
    texts: list[tuple[str, str]],
    copies: list[bytes] | None = None,
) -> list[bytes]:
    """Bytes to write for each record, read in source order and checked against their hashes.

    Args:
        writing: what every worker knows.
        sources: open files.
        window: (samples,) records.
        texts: key and member name of each.
        copies: gathered bytes, used where they are what they should be.

    Raises:
        UserError: a source vanished, changed, or cannot be read.
    """
    images: list[bytes] = [b""] * len(window)
    for place in np.lexsort((window["raw_offset"], window["unit"])):
        record, unit = window[place], writing.units[window["unit"][place]]
        if copies is not None and _is_hashed(copies[place], record):
            images[place] = copies[place]
            continue
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
            raise UserError(f"cannot read {escaped(path)}: {error.strerror}") from error
        except Refused:
            image = b""  # the hash below tells
        if not _is_hashed(image, record):
            raise UserError(
                f"{escaped(path)} changed since it was checked (at {escaped(texts[place][1])}):"
                " start again with an empty --out"
            )
        images[place] = image
    return images


def _is_hashed(image: bytes, record: np.void) -> bool:
    return int.from_bytes(hashlib.sha256(image).digest()[:8], "big") == record["sha_high"]
