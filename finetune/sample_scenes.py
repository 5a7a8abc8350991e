"""Make small scenes to try detection and segmentation on: digits on photographs.

`python -m finetune.sample_scenes --out DIR [--images N]` writes DIR/coco, as COCO lays its files
out, and DIR/ade, as ADE20K does. Scanned digits (scikit-learn's) are scaled, coloured and pasted
without overlap on crops of scikit-learn's two photographs. No download.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from l2vit import cli, files
from l2vit.errors import ConfigError, UserError

SIZE = (128, 160)
"""Height and width of a landscape picture; portraits are turned."""
_SIDES = (24, 56)
_INK = 0.35
_COLOURS = np.array(
    [[230, 60, 50], [250, 220, 40], [60, 90, 230], [250, 250, 250], [20, 20, 20], [220, 60, 220]]
)


@dataclass
class Scene:
    """A picture with its digits."""

    pixels: np.ndarray
    """(H, W, 3) bytes."""
    digits: list[int] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    """(H, W) bool, one for each digit."""
    crowd: bool = False
    """The last digit stands for a crowd."""


def make_scenes(count: int, seed: int = 0) -> list[Scene]:
    """``count`` scenes: landscapes and portraits in turn, one without digits, one with a crowd."""
    from sklearn.datasets import load_digits, load_sample_images

    digits, photographs = load_digits(), load_sample_images().images
    random = np.random.default_rng(seed)
    scenes = []
    for number in range(count):
        size = SIZE if number % 2 == 0 else SIZE[::-1]
        scene = Scene(_background(photographs[number % 2], size, random))
        if number != 2:
            for _ in range(int(random.integers(2, 5))):
                pick = int(random.integers(len(digits.images)))
                _paste(scene, digits.images[pick] / 16, int(digits.target[pick]), random)
        scene.crowd = number == 3
        scenes.append(scene)
    return scenes


def _background(
    photograph: np.ndarray, size: tuple[int, int], random: np.random.Generator
) -> np.ndarray:
    top = int(random.integers(photograph.shape[0] - size[0]))
    left = int(random.integers(photograph.shape[1] - size[1]))
    return photograph[top : top + size[0], left : left + size[1]].copy()


def _paste(scene: Scene, digit: np.ndarray, label: int, random: np.random.Generator) -> None:
    """Put a digit where none is yet; not at all if ten places are taken."""
    side = int(random.integers(_SIDES[0], _SIDES[1] + 1))
    scaled = Image.fromarray((digit * 255).astype(np.uint8)).resize((side, side))
    shape = np.asarray(scaled) > _INK * 255
    height, width = scene.pixels.shape[:2]
    for _ in range(10):
        top, left = (int(random.integers(limit - side)) for limit in (height, width))
        rows, columns = slice(top, top + side), slice(left, left + side)
        if any(mask[rows, columns].any() for mask in scene.masks):
            continue
        mask = np.zeros((height, width), bool)
        mask[rows, columns] = shape
        scene.pixels[mask] = _COLOURS[label % len(_COLOURS)]
        scene.digits.append(label)
        scene.masks.append(mask)
        return


def polygons(mask: np.ndarray) -> list[list[float]]:
    """A rectangle for every run of pixels in a row: together they cover the mask."""
    found = []
    for y in np.flatnonzero(mask.any(axis=1)):
        edges = np.flatnonzero(np.diff(np.pad(mask[y].astype(np.int8), 1)))
        for left, right in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            row = int(y)
            found.append([left, row, right, row, right, row + 1, left, row + 1])
    return found


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run-length encoding: column by column, zeros first."""
    flat = mask.T.reshape(-1).astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    ends = [0, *edges, len(flat)]
    counts = [b - a for a, b in itertools.pairwise(ends)]
    return {"size": list(mask.shape), "counts": counts}


def annotation(mask: np.ndarray, label: int, *, crowd: bool, runs: bool) -> dict[str, Any]:
    """One digit as COCO has it, but for its own and its picture's id."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "category_id": label + 1,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "iscrowd": int(crowd),
        "segmentation": run_lengths(mask) if crowd or runs else polygons(mask),
    }


def write_coco(scenes: Sequence[Scene], root: Path, split: str) -> Path:
    """Write pictures and their json as COCO does; returns the json's path."""
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, start=1):
        height, width = scene.pixels.shape[:2]
        name = f"{number:012d}.png"
        Image.fromarray(scene.pixels).save(folder / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for place, (label, mask) in enumerate(zip(scene.digits, scene.masks, strict=True)):
            crowd = scene.crowd and place == len(scene.digits) - 1
            entry = annotation(mask, label, crowd=crowd, runs=number % 2 == 0)
            annotations.append({"id": len(annotations) + 1, "image_id": number, **entry})
    data = {
        "info": {"description": "scanned digits on photographs, made by finetune.sample_scenes"},
        "categories": [{"id": k + 1, "name": f"digit {k}"} for k in range(10)],
        "images": images,
        "annotations": annotations,
    }
    path = root / "annotations" / f"instances_{split}2017.json"
    files.write_text(path, json.dumps(data) + "\n")
    return path


def write_ade(scenes: Sequence[Scene], root: Path, split: str) -> None:
    """Write pictures and label maps as ADE20K does: the digit + 1, and 0 elsewhere."""
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes, start=1):
        labels = np.zeros(scene.pixels.shape[:2], np.uint8)
        for label, mask in zip(scene.digits, scene.masks, strict=True):
            labels[mask] = label + 1
        name = f"{number:08d}.png"
        Image.fromarray(scene.pixels).save(root / "images" / split / name)
        Image.fromarray(labels).save(root / "annotations" / split / name)


@cli.program("finetune sample_scenes")
def main(argv: Sequence[str]) -> None:
    """Write the scenes the command line asks for."""
    parser = cli.parser("python -m finetune.sample_scenes", __doc__ or "")
    parser.add_argument("--out", required=True, type=Path, help="directory to write into")
    parser.add_argument("--images", type=int, default=8, help="pictures to train on (8)")
    parser.add_argument("--seed", type=int, default=0)
    _run(cli.parse(parser, argv))


def _run(options: argparse.Namespace) -> None:
    if options.images < 1:
        raise ConfigError("--images must be at least 1")
    splits = {"train": options.images, "val": max(2, options.images // 4)}
    try:
        for number, (split, count) in enumerate(splits.items()):
            scenes = make_scenes(count, seed=options.seed + number)
            write_coco(scenes, options.out / "coco", split)
            long = {"train": "training", "val": "validation"}[split]
            write_ade(scenes, options.out / "ade", long)
    except OSError as error:
        raise UserError(f"cannot write to {options.out}: {error.strerror}") from None
    cli.tell(f"{options.images} scenes to train on in {options.out}/coco and {options.out}/ade")


if __name__ == "__main__":
    sys.exit(main())
