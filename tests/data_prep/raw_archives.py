"""Makes the archives the data preparation tests run on: real encoders, then real damage."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """A smooth random RGB picture with some detail; unlike any other seed's."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + rng.integers(-12, 13, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def jpeg(seed: int, width: int = 96, height: int = 72, **options: object) -> bytes:
    return encoded(picture(seed, width, height), **{"quality": 90, **options})


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def class_members(wnid: str, images: Iterable[bytes]) -> list[tuple[str, bytes]]:
    return [(f"{wnid}_{number}.JPEG", data) for number, data in enumerate(images)]


def outer_tar(classes: Mapping[str, Iterable[bytes]]) -> bytes:
    """An ImageNet-22k-shaped archive: one tar per class inside one tar."""
    return tar_bytes(
        (f"{wnid}.tar", tar_bytes(class_members(wnid, images))) for wnid, images in classes.items()
    )


def small_release(classes: int = 3, images: int = 20, first_seed: int = 0) -> dict:
    """Made-up wnids with distinct pictures."""
    return {
        f"n9000000{c}": [jpeg(first_seed + 1000 * c + i) for i in range(images)]
        for c in range(classes)
    }


def write_release(path: Path, classes: Mapping[str, Iterable[bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(outer_tar(classes))
    return path


def zipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)
