"""How far the two backends' pictures lie apart, operation by operation, on photographs.

Each of 32 photographs is cropped, resized and put through one operation by both routes: pil's
(libjpeg-turbo, timm's function) and DALI's (its decoder, the batched operation).

    python benchmarks/augmentation.py [--pictures docs/img/augmentation]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.loader import make_photographs
from l2vit.data import augment_gpu, pil
from l2vit.data.augment import OP_NUMBER, OPS
from l2vit.data.dali import GraphInputs, build_graph

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
    files = [np.frombuffer(image, np.uint8) for image in images]
    corners, shapes = boxes[:, :2].astype(np.int32), boxes[:, 2:].astype(np.int32)
    sizes, windows = np.full_like(corners, SIZE, np.float32), np.zeros_like(corners)
    inputs = GraphInputs(files, corners, shapes, sizes, windows, np.zeros(len(images), np.int32))
    graph = build_graph(
        lambda: inputs,
        batch=len(images),
        input_size=SIZE,
        interpolation="bicubic",
        threads=1,
        prefetch=1,
        gpu=False,
        device_id=None,
    )
    graph.build()
    return torch.from_dlpack(graph.run()[0].as_tensor()).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=Path, help="directory for a picture of each operation")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        make_photographs(Path(work), COUNT)
        images = [path.read_bytes() for path in sorted(Path(work).glob("*/*.jpg"))]
    boxes = np.tile([40, 50, 300, 360], (COUNT, 1))
    decoded = [pil.decode(image) for image in images]
    with_pil = np.stack([pil.crop_resize(d, boxes[0], SIZE, "bicubic") for d in decoded])
    dali = through_dali(images, boxes)
    print("| operation | mean difference, of 255 | bytes apart by more than 2 |\n|---|---|---|")
    for name in ("", *OPS):
        ops = np.full((COUNT, 1), OP_NUMBER.get(name, -1), np.int16)
        values = np.full((COUNT, 1), ARGUMENT.get(name, 0.0))
        of_pil = pil.apply_ops(
            torch.from_numpy(with_pil.copy()), ops, values, fill=FILL, interpolation="bicubic"
        ).numpy()
        of_dali = augment_gpu.apply_ops(
            dali.clone(), ops, values, fill=FILL, interpolation="bicubic"
        ).numpy()
        apart = np.abs(of_pil.astype(int) - of_dali)
        print(f"| {name or 'none'} | {apart.mean():.2f} | {100 * (apart > 2).mean():.2f}% |")
        if options.pictures and name:
            options.pictures.mkdir(parents=True, exist_ok=True)
            side = np.concatenate([with_pil[0], of_pil[0], of_dali[0]], axis=1)
            small = Image.fromarray(side).resize((3 * 128, 128))
            small.save(options.pictures / f"{name}.jpg", quality=80)


if __name__ == "__main__":
    main()
