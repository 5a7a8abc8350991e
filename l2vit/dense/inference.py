"""A trained detector or segmentor over pictures, one at a time, and its score over a set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2vit import files
from l2vit.dense import coco
from l2vit.dense.coco import CocoScores, CocoSet
from l2vit.dense.scenes import SceneSet
from l2vit.dense.scores import PixelCounts
from l2vit.dense.transforms import read_picture
from l2vit.errors import UserError


@torch.no_grad()
def detect(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    """Detections of one picture (3, H, W) of bytes, on the CPU, labels from 0.

    The picture is alone in its batch: padding to another's size would change the answer.
    """
    device = next(model.parameters()).device
    [found] = model([picture.to(device).float() / 255])
    found = {name: value.cpu() for name, value in found.items()}
    first: Any = model.first_label
    return {**found, "labels": found["labels"] - first}


@torch.no_grad()
def segment(model: nn.Module, picture: Tensor) -> Tensor:
    """(H, W) int64 classes of one picture (3, H, W) of bytes, on the CPU."""
    device = next(model.parameters()).device
    [found] = model([picture.to(device).float() / 255])
    return found.cpu()


def detect_all(
    model: nn.Module,
    data: CocoSet,
    numbers: Sequence[int],
    *,
    beat: Callable[[], None] = lambda: None,
    show: Callable[[int, Tensor, dict[str, Tensor]], None] | None = None,
) -> list[dict[str, Any]]:
    """Detections of the pictures ``numbers`` in COCO's results format.

    Args:
        model: in evaluation mode.
        data: the set.
        numbers: which pictures.
        beat: called before each.
        show: called with the number, picture and detections of each.
    """
    entries: list[dict[str, Any]] = []
    for number in numbers:
        beat()
        picture = read_picture(data.images / data.files[number])
        found = detect(model, picture)
        entries += coco.results(int(data.image_ids[number]), found, data.categories)
        if show is not None:
            show(number, picture, found)
    return entries


def segment_all(
    model: nn.Module,
    data: SceneSet,
    numbers: Sequence[int],
    *,
    beat: Callable[[], None] = lambda: None,
    show: Callable[[int, Tensor, Tensor], None] | None = None,
) -> PixelCounts:
    """Counts of the pictures ``numbers``; arguments as of :func:`detect_all`."""
    counts = PixelCounts(data.classes)
    for number in numbers:
        beat()
        picture, labels = read_picture(data.pictures[number]), data.label_map(number)
        found = segment(model, picture)
        if found.shape != labels.shape:
            raise UserError(f"picture {data.pictures[number]} and its label map differ in size")
        counts.add(found, labels)
        if show is not None:
            show(number, picture, found)
    return counts


# -- ranks


def share_of(count: int, rank: int, world: int) -> list[int]:
    """Every ``world``-th number from ``rank`` on."""
    return list(range(rank, count, world))


def part_path(folder: Path, rank: int, world: int) -> Path:
    """Where a rank writes its detections for rank 0 to merge."""
    return folder / f"part-{rank:05d}-of-{world:05d}.json"


def write_part(entries: Sequence[dict[str, Any]], folder: Path, rank: int, world: int) -> None:
    """Write one rank's detections, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(part_path(folder, rank, world), json.dumps(list(entries)))


def merged(folder: Path, world: int, image_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The detections of all ranks in the order of the pictures; the parts are removed."""
    by_picture: dict[int, list[dict[str, Any]]] = {image: [] for image in image_ids}
    for rank in range(world):
        path = part_path(folder, rank, world)
        for entry in files.read_json(path, what="detections of a rank"):
            by_picture[entry["image_id"]].append(entry)
        path.unlink()
    return [entry for image in image_ids for entry in by_picture[image]]


def kinds_of(model: nn.Module) -> tuple[str, ...]:
    """What a detector is scored on: boxes, and masks where it gives them."""
    return ("bbox", "segm") if hasattr(model, "roi_heads") else ("bbox",)


def named_figures(scores: dict[str, CocoScores]) -> dict[str, float]:
    """``bbox_AP``, ``segm_AR_100``, ...: all figures of all kinds by one name each."""
    return dict(_named(scores))


def _named(scores: dict[str, CocoScores]) -> Iterator[tuple[str, float]]:
    for kind, found in scores.items():
        for name, value in found.figures.items():
            yield f"{kind}_{name}", value
