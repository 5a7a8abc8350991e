"""A training step of our detectors against torchvision's own over timm's Swin-T.

    OMP_NUM_THREADS=1 python benchmarks/dense.py --out benchmarks/results/dense.json
    python benchmarks/dense.py --size 512 640 --rounds 5 --heads retinanet

Both see the same pictures and boxes at the same size. Every round runs each model once, in turn;
figures are medians of CPU-seconds, which other work on the machine changes little. Memory is the
peak of PyTorch's tensors in a step, weights left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
from model import peak_bytes
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from l2vit.dense.detectors import mask_rcnn, retinanet
from l2vit.dense.levels import make_levels
from l2vit.files import write_json

CLASSES, OBJECTS = 80, 8
HEADS = ("retinanet", "mask_rcnn")
SWIN = "swin_tiny_patch4_window7_224"


class SwinPyramid(nn.Module):
    """timm's Swin-T under torchvision's feature pyramid, as torchvision builds its backbones."""

    def __init__(self, size: tuple[int, int], stages: tuple[int, ...], extra: Any) -> None:
        super().__init__()
        self.body = timm.create_model(
            SWIN, features_only=True, out_indices=stages, img_size=size, strict_img_size=False
        )
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 256, extra)
        self.out_channels = 256

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = [x.permute(0, 3, 1, 2) for x in self.body(images)]
        return self.fpn({str(i): x for i, x in enumerate(maps)})


def torchvisions(head: str, size: tuple[int, int]) -> nn.Module:
    """torchvision's detector with its own anchors, losses and pooling."""
    limits = {"min_size": min(size), "max_size": max(size)}
    ratios = ((0.5, 1.0, 2.0),) * 5
    if head == "retinanet":
        sizes = tuple(
            (x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512)
        )
        backbone = SwinPyramid(size, (1, 2, 3), LastLevelP6P7(768, 256))
        return RetinaNet(
            backbone, CLASSES, anchor_generator=AnchorGenerator(sizes, ratios), **limits
        )
    sizes = tuple((x,) for x in (32, 64, 128, 256, 512))
    backbone = SwinPyramid(size, (0, 1, 2, 3), LastLevelMaxPool())
    anchors = AnchorGenerator(sizes, ratios)
    return MaskRCNN(backbone, CLASSES + 1, rpn_anchor_generator=anchors, **limits)


def ours(head: str) -> nn.Module:
    """L²ViT-T under the reference's detector."""
    if head == "retinanet":
        return retinanet(make_levels("l2vit_tiny", stages=(1, 2, 3)), classes=CLASSES)
    return mask_rcnn(make_levels("l2vit_tiny", stages=(0, 1, 2, 3)), classes=CLASSES)


def made_batch(count: int, size: tuple[int, int]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Pictures and objects of random places and classes."""
    torch.manual_seed(0)
    height, width = size
    targets = []
    for _ in range(count):
        corner = torch.rand(OBJECTS, 2) * torch.tensor([width / 2, height / 2])
        boxes = torch.cat([corner, corner + 16 + torch.rand(OBJECTS, 2) * height / 3], dim=1)
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(1, CLASSES, (OBJECTS,))
        targets.append({"boxes": boxes, "labels": labels, "masks": masks, "size": size})
    return torch.rand(count, 3, height, width), targets


def step(model: nn.Module, images: Any, targets: list[dict[str, Any]]) -> None:
    """Forward and backward of one batch."""
    model.zero_grad(set_to_none=True)
    sum(model(images, targets).values()).backward()


def compare(head: str, options: argparse.Namespace) -> dict[str, Any]:
    """CPU-seconds and peak memory of a step of both."""
    size = tuple(options.size)
    models = {"torchvision, Swin-T": torchvisions(head, size), "ours, L2ViT-T": ours(head)}
    images, targets = made_batch(options.batch, size)
    inputs = {"torchvision, Swin-T": list(images), "ours, L2ViT-T": images}
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds + 1):
        for name, model in models.items():
            start = time.process_time()
            step(model.train(), inputs[name], targets)
            if number:  # the first warms up
                seconds[name].append(time.process_time() - start)
    found: dict[str, Any] = {}
    for name, model in models.items():
        found[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "cpu_seconds": statistics.median(seconds[name]),
            "peak_bytes": peak_bytes(lambda m=model, n=name: step(m, inputs[n], targets), "cpu"),
        }
        print(head, name, found[name], flush=True)
    theirs, own = found.values()
    found["ratio"] = {key: own[key] / theirs[key] for key in ("cpu_seconds", "peak_bytes")}
    print(head, "ours to torchvision's:", found["ratio"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(224, 320), help="height, width")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dense.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {head: compare(head, options) for head in options.heads}
    found["size"], found["torch"] = list(options.size), torch.__version__
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, found)


if __name__ == "__main__":
    main()
