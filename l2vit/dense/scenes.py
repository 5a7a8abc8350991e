"""Pictures with a label for every pixel: ADE20K, or any folders of pictures and label maps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from l2vit.dense.transforms import IGNORED
from l2vit.errors import UserError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_NAMES_FILE = "objectInfo150.txt"


@dataclass(frozen=True)
class SceneSet:
    """Pairs of a picture and a label map of the same stem."""

    pictures: tuple[Path, ...]
    labels: tuple[Path, ...]
    classes: int
    zero_is_other: bool

    def __len__(self) -> int:
        return len(self.pictures)

    @classmethod
    def read(cls, pictures: Path, labels: Path, *, classes: int, zero_is_other: bool) -> SceneSet:
        """Pair the files of two folders by stem.

        Raises:
            UserError: a folder that is missing or empty, or a picture without labels; names it.
        """
        for folder in (pictures, labels):
            if not folder.is_dir():
                raise UserError(f"no directory at {folder}")
        maps = {path.stem: path for path in sorted(labels.glob("*.png"))}
        found = sorted(p for p in pictures.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not found:
            raise UserError(f"no pictures in {pictures}")
        for path in found:
            if path.stem not in maps:
                raise UserError(f"picture {path} has no label map {labels / path.stem}.png")
        return cls(tuple(found), tuple(maps[p.stem] for p in found), classes, zero_is_other)

    @property
    def identity(self) -> str:
        """Equal for equal lists of pictures and equal classes."""
        parts = [path.stem for path in self.pictures]
        text = "\n".join([str(self.classes), str(self.zero_is_other), *parts])
        return hashlib.sha256(text.encode()).hexdigest()

    def label_map(self, number: int) -> Tensor:
        """(H, W) bytes: classes from 0, 255 where a pixel does not count.

        Raises:
            UserError: an unreadable map, one with several channels, or a label of no class.
        """
        path = self.labels[number]
        try:
            with Image.open(path) as image:
                found = np.array(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"label map {path} cannot be decoded: {error}") from None
        if found.ndim != 2:
            raise UserError(f"label map {path} has {found.ndim} dimensions, not one value a pixel")
        found = found.astype(np.int64)
        if self.zero_is_other:
            found = np.where((found == 0) | (found == IGNORED), IGNORED, found - 1)
        wrong = (found != IGNORED) & ((found < 0) | (found >= self.classes))
        if wrong.any():
            value = int(found[wrong][0]) + self.zero_is_other
            raise UserError(f"label map {path}: label {value} is of none of {self.classes} classes")
        return torch.from_numpy(found.astype(np.uint8))


def class_names(root: Path | None, classes: int) -> tuple[str, ...]:
    """ADE20K's names from its own list, if it is there and fits; else the classes' numbers."""
    path = root / _NAMES_FILE if root else None
    if path and path.is_file():
        rows = [line.split("\t") for line in path.read_text().splitlines()[1:] if line.strip()]
        names = tuple(row[-1].split(",")[0].strip() for row in rows)
        if len(names) == classes == len(set(names)):
            return names
    return tuple(str(number) for number in range(1, classes + 1))
