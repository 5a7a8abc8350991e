"""A tiny shard maker written from the contract, independent of data_prep."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from l2vit.data.manifest import Manifest, Shard


def photo(seed: int, width: int, height: int) -> np.ndarray:
    """A smooth picture with edges and some grain: photographs' statistics, roughly."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC), float)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    image[top : top + height // 3, left : left + width // 4] = rng.integers(0, 256, 3)
    image += rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


@dataclass
class Shards:
    """A shard directory and what was put into it."""

    directory: Path
    manifest: Manifest
    images: list[bytes] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def write_shards(
    directory: Path,
    images: list[bytes],
    labels: list[int],
    *,
    per_shard: int,
    classes: int,
    checksums: bool = True,
    extension: str = "jpg",
) -> Shards:
    """Write a finished shard directory in the layout of the contract."""
    directory.mkdir(parents=True, exist_ok=True)
    shards, keys = [], []
    for number, first in enumerate(range(0, len(images), per_shard)):
        path = directory / f"shard-{number:06d}.tar"
        index, sums = [], []
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + per_shard, len(images))):
                key = f"s{i:06d}"
                keys.append(key)
                fields, sum_ = [], 0
                for ext, data in ((extension, images[i]), ("cls", b"%05d" % labels[i])):
                    info = tarfile.TarInfo(f"{key}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    at = tar.offset - -(-len(data) // 512) * 512
                    fields.append(f"{ext} {at} {len(data)} {key}.{ext}")
                    sum_ = zlib.crc32(data, sum_)
                index.append(" ".join(fields))
                sums.append(sum_)
        text = f"v1.2 {len(index)}\n" + "".join(line + "\n" for line in index)
        path.with_suffix(".idx").write_text(text)
        if checksums:
            np.array(sums, "<u4").tofile(path.with_suffix(".crc"))
        data = path.read_bytes()
        shards.append(
            Shard(
                path.name,
                len(index),
                len(data),
                hashlib.sha256(data).hexdigest(),
                hashlib.sha256(text.encode()).hexdigest(),
            )
        )
    manifest = Manifest(
        dataset="test",
        split="train",
        classes=tuple(f"n{i:08d}" for i in range(classes)),
        shards=tuple(shards),
        class_counts=tuple(np.bincount(labels, minlength=classes).tolist()),
    )
    info = {
        "name": "train",
        "num_samples": len(images),
        "filenames": [shard.name for shard in shards],
        "shard_lengths": [shard.samples for shard in shards],
    }
    (directory / "_info.json").write_text(json.dumps({"splits": {"train": info}}))
    manifest.save(directory)
    return Shards(directory, manifest, images, labels, keys)
