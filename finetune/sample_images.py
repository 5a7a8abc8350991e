"""Real pictures for the proof of an export: from shards, from files, or scikit-learn's."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from l2vit.data.manifest import MANIFEST_NAME, Manifest
from l2vit.data.shards import BadSample, ShardReader
from l2vit.errors import UserError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}


@dataclass(frozen=True)
class Sample:
    """An encoded picture and its class identifier, empty where it is not known."""

    name: str
    data: bytes
    label: str = ""

    def picture(self) -> Image.Image:
        """Decoded to RGB.

        Raises:
            UserError: it cannot be decoded; names it.
        """
        try:
            with Image.open(io.BytesIO(self.data)) as picture:
                return picture.convert("RGB")
        except OSError as error:
            raise UserError(f"picture {self.name} cannot be decoded: {error}") from error


def samples_at(path: Path, count: int) -> list[Sample]:
    """Up to ``count`` pictures (0: all) spread evenly over a shard directory, folder or file.

    Raises:
        UserError: nothing there to read.
    """
    if (path / MANIFEST_NAME).is_file():
        return _from_shards(path, count)
    if path.is_file():
        return [Sample(str(path), path.read_bytes())]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not found:
        raise UserError(f"no pictures at {path}: give a shard directory, a folder or a file")
    chosen = [found[i] for i in spread(len(found), count)]
    return [Sample(str(p), p.read_bytes(), p.parent.name) for p in chosen]


def spread(available: int, count: int) -> list[int]:
    """``count`` (0: all) indices spread evenly over ``range(available)``."""
    if count <= 0 or count >= available:
        return list(range(available))
    return np.linspace(0, available - 1, count).round().astype(int).tolist()


def _from_shards(path: Path, count: int) -> list[Sample]:
    manifest = Manifest.load(path)
    manifest.require_shards(path)
    reader = ShardReader(path, manifest)
    samples = []
    for number in spread(manifest.samples, count):
        try:
            found = reader.read(number)
        except BadSample as error:
            shard = path / reader.shard_name(number)
            raise UserError(
                f"{shard}: sample {reader.key_of(number)} is unusable: {error}"
            ) from None
        samples.append(Sample(reader.key_of(number), found.image, manifest.classes[found.label]))
    return samples


def embedded() -> list[Sample]:
    """Ten photographs: scikit-learn's two sample photographs and their quarters."""
    from sklearn.datasets import load_sample_images

    samples = []
    loaded = load_sample_images()
    for file, pixels in zip(loaded.filenames, loaded.images, strict=True):
        name, (height, width, _) = Path(file).stem, pixels.shape
        parts = {name: pixels}
        for y in (0, 1):
            for x in (0, 1):
                rows = slice(y * height // 2, (y + 1) * height // 2)
                columns = slice(x * width // 2, (x + 1) * width // 2)
                parts[f"{name}-{y}{x}"] = pixels[rows, columns]
        for part, array in parts.items():
            stream = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(array)).save(stream, "PNG")
            samples.append(Sample(f"{part}.png", stream.getvalue()))
    return samples
