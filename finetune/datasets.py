"""What an evaluation runs on: a shard directory or class folders, and what its labels mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from l2vit.data import labels
from l2vit.data.batch import Batch
from l2vit.data.manifest import MANIFEST_NAME, Manifest, class_hash
from l2vit.data.shards import ShardReader
from l2vit.errors import UserError
from l2vit.train.evaluation import class_columns
from l2vit.train.weights import Preprocessing, PretrainedWeights

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
_REAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass
class Dataset:
    """Images to evaluate on and the label set they are counted in."""

    path: Path
    classes: tuple[str, ...]
    """The label set: which class each row of the (restricted) answers is."""
    columns: tuple[int, ...] | None
    """The model's outputs that form the label set, in its order; None for all of them, -1 for a
    class the model does not know: its images count as wrong."""
    names: Sequence[str]
    """What each sample id is: a file or a shard's key."""
    accepted: dict[int, frozenset[int]] | None = None
    """ReaL: all right answers by sample id."""
    images: list[tuple[Path, int]] = field(default_factory=list)
    """Files and labels of class folders; empty for shards."""
    identity: str = ""
    """The manifest's hash, where there is one."""
    assumption: str = ""


def transform(preprocessing: Preprocessing) -> Any:
    """timm's evaluation transform: PIL image to a normalised (3, H, W) float32 tensor."""
    from timm.data import create_transform

    return create_transform(
        input_size=(3, preprocessing.input_size, preprocessing.input_size),
        is_training=False,
        interpolation="bicubic",
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_fraction,
        crop_mode=preprocessing.crop_mode,
    )


def open_dataset(path: Path, source: PretrainedWeights, label_set: str = "data") -> Dataset:
    """Find out what ``path`` holds and how its labels map to the model's outputs.

    Args:
        path: a shard directory, or a folder with one folder of pictures per class.
        source: the model; its ``classes`` name its outputs.
        label_set: ``data``: what the shards or folder names say; the others are timm's tables:
            ``imagenet-a``/``imagenet-r`` let the model choose among their 200 classes only,
            ``imagenet-v2`` reads folders named 0 … 999, ``real`` accepts all ReaL labels.

    Raises:
        UserError: no images there, or a class the model does not know; names it.
    """
    if not path.is_dir():
        raise UserError(f"no such data directory: {path}")
    outputs, assumption = _outputs(source)
    if (path / MANIFEST_NAME).is_file():
        dataset = _shards(path, outputs, source, label_set)
    else:
        dataset = _folders(path, outputs, label_set)
    dataset.assumption = assumption
    if label_set == "real":
        dataset.accepted = _real_labels(dataset)
    return dataset


def open_plain(path: Path) -> Dataset:
    """What ``path`` holds under its own classes, whatever a model knows.

    Raises:
        UserError: neither shards nor folders of pictures.
    """
    if not path.is_dir():
        raise UserError(f"no such data directory: {path}")
    if not (path / MANIFEST_NAME).is_file():
        return _folders(path, (), "data")
    manifest = Manifest.load(path)
    manifest.require_shards(path)
    return Dataset(path, manifest.classes, None, (), identity=manifest.hash)


def same_classes(dataset: Dataset, other: Dataset) -> list[int]:
    """For each class of ``dataset`` its row among those of ``other``.

    Raises:
        UserError: a class that ``other`` does not have; names the first.
    """
    row = {name: i for i, name in enumerate(other.classes)}
    missing = [name for name in dataset.classes if name not in row]
    if missing:
        raise UserError(f"{other.path} has no pictures of {missing[0]}, a class of {dataset.path}")
    return [row[name] for name in dataset.classes]


def _outputs(source: PretrainedWeights) -> tuple[tuple[str, ...], str]:
    if source.classes:
        return source.classes, ""
    count = source.num_classes
    return labels.usual_classes(count), (
        f"{source.path} does not name its {count} classes: taken to be ImageNet's in sorted order"
        if labels.usual_classes(count)
        else f"{source.path} does not name its {count} classes: taken to be the data's"
    )


def _shards(
    path: Path, outputs: tuple[str, ...], source: PretrainedWeights, label_set: str
) -> Dataset:
    manifest = Manifest.load(path)
    manifest.require_shards(path)
    if not outputs and len(manifest.classes) == source.num_classes:
        outputs = manifest.classes
    columns = None
    if class_hash(outputs) != manifest.class_hash:
        columns = _columns(manifest.classes, outputs, str(path))
    if label_set in ("imagenet-a", "imagenet-r"):
        table = labels.evaluation_classes(label_set)
        if set(manifest.classes) != set(table):
            raise UserError(f"{path} does not hold the 200 classes of {label_set}")
    reader = ShardReader(path, manifest)
    names = [reader.key_of(number) for number in range(manifest.samples)]
    return Dataset(path, manifest.classes, columns, names, identity=manifest.hash)


def _columns(classes: Sequence[str], outputs: Sequence[str], name: str) -> tuple[int, ...]:
    columns = class_columns(tuple(outputs), tuple(classes), name)
    return tuple(range(len(outputs))) if columns is None else tuple(columns.tolist())


def _folders(path: Path, outputs: tuple[str, ...], label_set: str) -> Dataset:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"{path} holds neither {MANIFEST_NAME} nor a folder per class")
    classes, columns = outputs or tuple(p.name for p in folders), None
    if label_set in ("imagenet-a", "imagenet-r"):
        classes = labels.evaluation_classes(label_set)
        columns = _columns(classes, outputs, label_set)
    place = {name: i for i, name in enumerate(classes)}
    images = []
    for folder in folders:
        name = _class_of(folder, label_set)
        if name not in place:
            raise UserError(f"folder {folder} is no class of the model ({len(classes)} classes)")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        images += [(file, place[name]) for file in files]
    if not images:
        raise UserError(f"{path} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    names = [str(file.relative_to(path)) for file, _ in images]
    return Dataset(path, classes, columns, names, images=images)


def _class_of(folder: Path, label_set: str) -> str:
    if label_set != "imagenet-v2":
        return folder.name
    table = labels.usual_classes(1000)
    if not folder.name.isdecimal() or int(folder.name) >= len(table):
        raise UserError(f"{folder}: ImageNet-V2 names its folders 0 to 999")
    return table[int(folder.name)]


def _real_labels(dataset: Dataset) -> dict[int, frozenset[int]]:
    """The ReaL labels ("Are we done with ImageNet?") of each image, as rows of the label set."""
    table = labels.real_labels()
    row = {name: i for i, name in enumerate(dataset.classes)}
    rows = [row.get(wnid, -1) for wnid in labels.usual_classes(1000)]
    accepted = {}
    for i, name in enumerate(dataset.names):
        match = _REAL_NAME.search(name)
        if match is None or not 1 <= int(match[1]) <= len(table):
            raise UserError(f"ReaL needs names such as ILSVRC2012_val_00000001, not {name}")
        accepted[i] = frozenset(rows[label] for label in table[int(match[1]) - 1])
    return accepted


class FolderLoader:
    """Batches of the pictures in ``images``, each once, in order, decoded by PIL.

    Args:
        images: files and labels.
        preprocessing: how they are shown to the model.
        batch: images a batch.
        threads: worker processes; 0 decodes here.
        device: where the batches go.
    """

    def __init__(
        self,
        images: Sequence[tuple[Path, int]],
        preprocessing: Preprocessing,
        *,
        batch: int,
        threads: int,
        device: torch.device,
    ) -> None:
        pictures = _Pictures(images, transform(preprocessing))
        self._loader = torch.utils.data.DataLoader(
            pictures, batch_size=batch, num_workers=threads, collate_fn=_collate
        )
        self._device = device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for pictures, answers, ids in self._loader:
            pictures = pictures.to(self._device, memory_format=torch.channels_last)
            numbers = np.array(ids, dtype=np.int64)
            yield Batch(pictures, answers.to(self._device), numbers, numbers, 0)

    def close(self) -> None:
        """Nothing is held between iterations."""


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, images: Sequence[tuple[Path, int]], show: Any) -> None:
        self._images, self._show = images, show

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        path, label = self._images[index]
        return self._show(read_picture(path)), label, index


def read_picture(path: Path) -> Image.Image:
    """Decode a picture to RGB.

    Raises:
        UserError: it cannot be decoded; names the file.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise UserError(f"picture {path} cannot be read: {error}") from error


def _collate(
    samples: list[tuple[torch.Tensor, int, int]],
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    pictures, labels, ids = zip(*samples, strict=True)
    return torch.stack(pictures), torch.tensor(labels), list(ids)
