"""COCO-style annotations: read, checked, turned into targets, and detections scored.

Any json of COCO's form will do. Its categories, sorted by id, are the classes 0 to K − 1. The only
file that knows pycocotools.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from l2vit import files
from l2vit.errors import UserError

NO_CATEGORY = -1
"""A class of a model that a json does not know: its detections do not count."""
MIN_SIDE = 32
"""Pictures with a side below are not trained on."""
FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
RECALLS = ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")


@dataclass
class LeftOut:
    """Boxes that are not trained on: how many, and the first, by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, entry: str) -> None:
        """Count one more box left out for ``reason``."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, entry)

    def lines(self) -> list[str]:
        """One line for each reason, naming the first box."""
        return [
            f"{count:,} boxes left out, {reason} (first: {self.first[reason]})"
            for reason, count in self.counts.items()
        ]


@dataclass
class CocoSet:
    """Pictures and their boxes, as arrays that worker processes share."""

    path: Path
    images: Path
    """The folder that ``file_name`` is relative to."""
    categories: tuple[int, ...]
    """The json's category ids, in the order of the classes."""
    names: tuple[str, ...]
    files: list[str]
    image_ids: Tensor
    """(pictures,) int64."""
    sizes: Tensor
    """(pictures, 2) int64: height and width."""
    annotated: Tensor
    """(pictures,) bool: whether any annotation, usable or not, is of this picture."""
    starts: Tensor
    """(pictures + 1,) int64: where each picture's boxes begin."""
    boxes: Tensor
    """(boxes, 4) float32: left, top, right, bottom, inside the picture."""
    labels: Tensor
    """(boxes,) int64 classes."""
    annotation_ids: Tensor
    shapes: Tensor
    """uint8: the segmentations as json, one after the other."""
    shape_starts: Tensor
    """(boxes + 1,) int64: where each box's segmentation begins in ``shapes``."""
    left_out: LeftOut

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def read(cls, path: Path, images: Path) -> CocoSet:
        """Read and check a json and see that its pictures are there.

        Raises:
            UserError: one line that names the file and the entry at fault.
        """
        data = read_annotations(path)
        if not data["annotations"]:
            raise UserError(f"{path}: annotations is empty")
        _check_files(path, images, data["images"])
        return cls._from(path, images, data)

    @classmethod
    def _from(cls, path: Path, images: Path, data: dict[str, Any]) -> CocoSet:
        categories = sorted(data["categories"], key=lambda c: c["id"])
        class_of = {category["id"]: k for k, category in enumerate(categories)}
        pictures = sorted(data["images"], key=lambda image: image["id"])
        by_picture: dict[int, list[Any]] = {image["id"]: [] for image in pictures}
        for annotation in data["annotations"]:
            by_picture[annotation["image_id"]].append(annotation)
        left_out, starts, kept = LeftOut(), [0], []
        for image in pictures:
            for annotation in by_picture[image["id"]]:
                box = _usable(annotation, image, left_out)
                if box is not None:
                    kept.append((annotation, box))
            starts.append(len(kept))
        shapes = [json.dumps(a.get("segmentation") or []).encode() for a, _ in kept]
        return cls(
            path=path,
            images=images,
            categories=tuple(category["id"] for category in categories),
            names=tuple(str(category["name"]) for category in categories),
            files=[image["file_name"] for image in pictures],
            image_ids=torch.tensor([image["id"] for image in pictures]),
            sizes=torch.tensor([[image["height"], image["width"]] for image in pictures]),
            annotated=torch.tensor([bool(by_picture[image["id"]]) for image in pictures]),
            starts=torch.tensor(starts),
            boxes=torch.tensor([box for _, box in kept]).view(-1, 4),
            labels=torch.tensor([class_of[a["category_id"]] for a, _ in kept]).long(),
            annotation_ids=torch.tensor([a["id"] for a, _ in kept]).long(),
            shapes=torch.frombuffer(bytearray(b"".join(shapes) or b" "), dtype=torch.uint8),
            shape_starts=torch.tensor(np.cumsum([0, *map(len, shapes)])),
            left_out=left_out,
        )

    def trainable(self) -> np.ndarray:
        """Numbers of the pictures with an annotation and with sides of 32 pixels and more."""
        return np.flatnonzero((self.annotated & (self.sizes.amin(1) >= MIN_SIDE)).numpy())

    def landscape(self) -> np.ndarray:
        """(pictures,) bool: wider than high."""
        return (self.sizes[:, 1] > self.sizes[:, 0]).numpy()

    def target(self, number: int, *, masks: bool) -> dict[str, Tensor]:
        """``boxes``, ``labels`` and, if asked for, ``masks`` (objects, H, W) of a picture.

        Raises:
            UserError: a segmentation that cannot be read; names the annotation.
        """
        rows = slice(int(self.starts[number]), int(self.starts[number + 1]))
        found = {"boxes": self.boxes[rows].clone(), "labels": self.labels[rows].clone()}
        if masks:
            size = self.sizes[number].tolist()
            drawn = [self._mask(row, size) for row in range(rows.start, rows.stop)]
            empty = torch.zeros(0, *size, dtype=torch.uint8)
            found["masks"] = torch.stack(drawn) if drawn else empty
        return found

    def _mask(self, row: int, size: Sequence[int]) -> Tensor:
        start, stop = int(self.shape_starts[row]), int(self.shape_starts[row + 1])
        shape = json.loads(bytes(self.shapes[start:stop].numpy()))
        try:
            drawn = draw_segmentation(shape, size[0], size[1])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(
                f"{self.path}: annotation {int(self.annotation_ids[row])}: segmentation cannot be"
                f" read ({error})"
            ) from None
        return torch.from_numpy(drawn)


def read_annotations(path: Path) -> dict[str, Any]:
    """The json at ``path``, every entry checked.

    Raises:
        UserError: names the file and the first entry at fault.
    """
    data = files.read_json(path, what="COCO annotations")
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected an object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise UserError(f"{path}: {key} is missing or no list")
        if not data[key] and key != "annotations":
            raise UserError(f"{path}: {key} is empty")
    try:
        _check_entries(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return data


def _check_entries(data: dict[str, Any]) -> None:
    categories = _unique(data["categories"], "categories", "category")
    names: dict[str, int] = {}
    for key, category in categories.items():
        name = str(category.get("name", ""))
        if not name or name in names:
            other = f" as is category {names[name]}" if name else ""
            raise UserError(f"category {key}: called {name!r}{other}")
        names[name] = key
    images = _unique(data["images"], "images", "image")
    for key, image in images.items():
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise UserError(f"image {key}: no file_name")
        for side in ("height", "width"):
            if not _is_whole(image.get(side)) or image[side] < 1:
                raise UserError(f"image {key}: {side} {image.get(side)!r} is not a whole number")
    for key, annotation in _unique(data["annotations"], "annotations", "annotation").items():
        _check_annotation(f"annotation {key}", annotation, images, categories)


def _unique(entries: list[Any], where: str, what: str) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or not _is_whole(entry.get("id")):
            given = entry.get("id") if isinstance(entry, dict) else entry
            raise UserError(f"{where}[{place}]: id {given!r} is not a whole number")
        if entry["id"] in found:
            raise UserError(f"{where}[{place}]: {what} id {entry['id']} is there twice")
        found[entry["id"]] = entry
    return found


def _check_annotation(
    what: str, entry: dict[str, Any], images: Mapping[int, Any], categories: Mapping[int, Any]
) -> None:
    known = {"image_id": ("images", images), "category_id": ("categories", categories)}
    for key, (where, entries) in known.items():
        value = entry.get(key)
        if not _is_whole(value):
            raise UserError(f"{what}: {key} {value!r} is not a whole number")
        if value not in entries:
            raise UserError(f"{what}: {key} {value} is not among the {where}")
    box = entry.get("bbox")
    numbers = isinstance(box, list) and len(box) == 4 and all(_is_number(v) for v in box)
    if not numbers:
        raise UserError(f"{what}: bbox {box!r} is not left, top, width and height")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_files(path: Path, images: Path, entries: list[dict[str, Any]]) -> None:
    if not images.is_dir():
        raise UserError(f"no directory of pictures at {images}")
    there = {entry.name for entry in images.iterdir()}
    for entry in entries:
        name = entry["file_name"]
        if name not in there and not (images / name).is_file():
            raise UserError(f"{path}: image {entry['id']}: no file {images / name}")


def _usable(
    annotation: dict[str, Any], image: dict[str, Any], left_out: LeftOut
) -> list[float] | None:
    """The box (left, top, right, bottom) inside the picture; None, and noted, if not trained on."""
    left, top, width, height = (float(v) for v in annotation["bbox"])
    box = [max(left, 0.0), max(top, 0.0)]
    box += [min(left + width, float(image["width"])), min(top + height, float(image["height"]))]
    reason = ""
    if annotation.get("ignore"):
        reason = "to be ignored"
    elif annotation.get("iscrowd"):
        reason = "of crowds"
    elif width < 1 or height < 1 or annotation.get("area", 1) <= 0:
        reason = "with less than a pixel"
    elif box[2] <= box[0] or box[3] <= box[1]:
        reason = "outside of their picture"
    if reason:
        left_out.add(reason, f"annotation {annotation['id']} of image {image['id']}")
        return None
    return box


def draw_segmentation(shape: Any, height: int, width: int) -> np.ndarray:
    """(H, W) uint8 of zeros and ones: polygons, or a run-length encoding of either kind.

    Raises:
        ValueError: nothing to draw.
    """
    if isinstance(shape, list):
        polygons = [polygon for polygon in shape if len(polygon) >= 6]
        if not polygons:
            raise ValueError("no polygon of three corners")
        encoded = rle.merge(rle.frPyObjects(polygons, height, width))
    elif not isinstance(shape, dict):
        raise ValueError(f"it is {shape!r}")
    elif isinstance(shape.get("counts"), list):
        encoded = rle.frPyObjects(shape, height, width)
    else:
        encoded = shape
    drawn = rle.decode(encoded)
    if drawn.shape != (height, width):
        raise ValueError(f"its size is {drawn.shape}, the picture's {(height, width)}")
    return np.ascontiguousarray(drawn)


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Masks (N, H, W) as json takes them: compressed run lengths."""
    encoded = []
    for mask in masks:
        found = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
        encoded.append({"size": list(found["size"]), "counts": found["counts"].decode()})
    return encoded


def results(image_id: int, found: Mapping[str, Any], categories: Sequence[int]) -> list[Any]:
    """Detections of one picture as COCO's results format has them, best first.

    Args:
        image_id: the picture's id in the json.
        found: ``boxes``, ``scores``, ``labels`` from 0, and ``masks`` (N, H, W) where there are.
        categories: category id of each class, or ``NO_CATEGORY``.
    """
    masks: list[Any] = [None] * len(found["scores"])
    if "masks" in found:
        masks = encode_masks(found["masks"].numpy())
    entries = []
    columns = (found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), masks)
    for (left, top, right, bottom), score, label, mask in zip(*columns, strict=True):
        if categories[label] == NO_CATEGORY:
            continue
        entry = {
            "image_id": image_id,
            "category_id": categories[label],
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        entries.append(entry if mask is None else {**entry, "segmentation": mask})
    return entries


def as_kind(entries: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The results of one kind, ``bbox`` or ``segm``, without what belongs to the other."""
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    return [{k: v for k, v in entry.items() if k != other} for entry in entries]


@dataclass
class CocoScores:
    """What pycocotools finds; -1 where there is nothing to find."""

    figures: dict[str, float]
    """The twelve figures of COCO, from 0 to 1."""
    per_class: dict[str, float]
    """AP of each class by name."""
    precision: np.ndarray
    """(10 IoUs, 101 recalls) mean over the classes that occur."""


def score(data: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], kind: str) -> CocoScores:
    """Score results of ``kind`` (``bbox`` or ``segm``) against annotations.

    Args:
        data: as ``read_annotations`` gives it.
        entries: of all pictures, as ``results`` gives them.
        kind: what is compared.
    """
    truth = _indexed(dict(data))
    listed = [dict(entry) for entry in as_kind(entries, kind)]
    with contextlib.redirect_stdout(io.StringIO()):
        answers = truth.loadRes(listed) if listed else _indexed({**data, "annotations": []})
        judge = COCOeval(truth, answers, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][:, :, :, 0, 2]  # IoU, recall, class; all areas, 100 boxes
    names = {category["id"]: str(category["name"]) for category in data["categories"]}
    per_class = {
        names[key]: _mean(precision[:, :, place]) for place, key in enumerate(judge.params.catIds)
    }
    occurring = [k for k in range(precision.shape[2]) if (precision[:, :, k] > -1).any()]
    curves = precision[:, :, occurring].mean(axis=2) if occurring else precision[:, :, :0].sum(2)
    figures = dict(zip((*FIGURES, *RECALLS), map(float, judge.stats), strict=True))
    return CocoScores(figures, per_class, curves)


def _mean(values: np.ndarray) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0


def _indexed(data: dict[str, Any]) -> COCO:
    """pycocotools' own object; it writes into the entries, so they are copies."""
    made = COCO()
    made.dataset = {
        **data,
        "annotations": [
            {"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry}
            for entry in data["annotations"]
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        made.createIndex()
    return made
