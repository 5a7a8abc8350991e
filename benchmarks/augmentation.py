"""How far the two backends' pictures lie apart, operation by operation, on photographs.

Each of 32 photographs is cropped, resized and put through one operation by both routes: the host's
(libjpeg-turbo, timm's function) and DALI's (its decoder, the batched operation).

    python benchmarks/augmentation.py [--pictures docs/img/augmentation]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.loader import make_photographs
from l2vit.data import host_ops
from l2vit.data.dali_loader import DaliBatches, Feed
from l2vit.data.draws import OP_NUMBER, OPS
from l2vit.data.pixel_ops import apply_ops_batched, apply_ops_one_by_one
from l2vit.data.plan import Work

SIZE, COUNT = 224, 32
FILL = (124, 116, 104)
ARGUMENT = {  # magnitude 9 of 10, increasing, as in rand-m9-mstd0.5-inc1
    "Rotate": 27.0,
    "Posterize": 1.0,
    "Solarize": 26.0,
    "SolarizeAdd": 99.0,
    "Color": 1.81,
    "Contrast": 1.81,
    "Brightness": 1.81,
    "Sharpness": 1.81,
    "ShearX": 0.27,
    "ShearY": 0.27,
    "TranslateXRel": 0.405,
    "TranslateYRel": 0.405,
}


def through_dali(images: list[bytes], boxes: np.ndarray) -> torch.Tensor:
    """(n, SIZE, SIZE, 3) uint8 from the graph."""
    count = len(images)

    def make(number: int, *, check: Any) -> Feed:
        ids = np.arange(count)
        sizes, windows = np.full((count, 2), SIZE), np.zeros((count, 2), np.int64)
        work = Work(number, 0, ids, ids)
        return Feed(work, ids, ids, images, boxes, sizes, windows, np.zeros(count, bool))

    settings = {"batch": count, "input_size": SIZE, "interpolation": "bicubic", "threads": 1}
    batches = DaliBatches(make, count=1, prefetch=1, gpu=False, device_id=None, **settings)
    return next(iter(batches))[1].clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=Path, help="directory for a picture of each operation")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        make_photographs(Path(work), COUNT)
        images = [path.read_bytes() for path in sorted(Path(work).glob("*/*.jpg"))]
    boxes = np.tile([40, 50, 300, 360], (COUNT, 1))
    decoded = [host_ops.decode(image) for image in images]
    host = np.stack([host_ops.crop_resize(d, boxes[0], SIZE, "bicubic") for d in decoded])
    dali = through_dali(images, boxes)
    print("| operation | mean difference, of 255 | bytes apart by more than 2 |\n|---|---|---|")
    for name in ("", *OPS):
        ops = np.full((COUNT, 1), OP_NUMBER.get(name, -1), np.int16)
        values = np.full((COUNT, 1), ARGUMENT.get(name, 0.0))
        of_host = apply_ops_one_by_one(
            torch.from_numpy(host.copy()), ops, values, fill=FILL, interpolation="bicubic"
        ).numpy()
        of_dali = apply_ops_batched(
            dali.clone(), ops, values, fill=FILL, interpolation="bicubic"
        ).numpy()
        apart = np.abs(of_host.astype(int) - of_dali)
        print(f"| {name or 'none'} | {apart.mean():.2f} | {100 * (apart > 2).mean():.2f}% |")
        if options.pictures and name:
            options.pictures.mkdir(parents=True, exist_ok=True)
            side = np.concatenate([host[0], of_host[0], of_dali[0]], axis=1)
            small = Image.fromarray(side).resize((3 * 128, 128))
            small.save(options.pictures / f"{name}.jpg", quality=80)


if __name__ == "__main__":
    main()
