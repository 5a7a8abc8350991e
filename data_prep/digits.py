"""Real images without a download: scikit-learn's digits as a release shaped like ImageNet-22k."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from l2vit import files

ARCHIVE = "digits_whole.tar"


def digit_wnid(digit: int) -> str:
    """A made-up class identifier that sorts by digit and is no WordNet id."""
    return f"n{digit:08d}"


def write_digits(out: Path, side: int = 64) -> Path:
    """Write ``out/digits_whole.tar``: one tar per digit, each holding JPEGs named as ImageNet's.

    The 1,797 scanned 8×8 digits are enlarged bicubically to ``side`` pixels, gray as RGB. The
    bytes are the same on every run with the same Pillow.

    Returns:
        The archive's path.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    out.mkdir(parents=True, exist_ok=True)
    with (
        files.atomic_writer(out / ARCHIVE) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as outer,
    ):
        for digit in range(10):
            name = digit_wnid(digit)
            inner = io.BytesIO()
            _write_class(inner, name, digits.images[digits.target == digit], side)
            _add(outer, f"{name}.tar", inner.getvalue())
    return out / ARCHIVE


def _write_class(stream: BinaryIO, name: str, images: np.ndarray, side: int) -> None:
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number, pixels in enumerate(images):
            gray = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
            picture = gray.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")
            encoded = io.BytesIO()
            picture.save(encoded, "JPEG", quality=95)
            _add(archive, f"{name}_{number}.JPEG", encoded.getvalue())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
