"""Segmentors: score them, draw what they see, count them, export them.

`python -m finetune.segment evaluate|predict|describe|export`; docs/dense.md has examples. Training:
`bash launch/finetune.sh --config finetune/configs/ade20k_...yaml`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.io import write_png

from finetune import dense
from l2vit import cli, files
from l2vit.dense import inference
from l2vit.dense.count import count_segmentor
from l2vit.dense.drawing import draw_labels
from l2vit.dense.scenes import SceneSet
from l2vit.errors import ConfigError
from l2vit.train import tasks
from l2vit.train.dense_config import SegmentConfig
from l2vit.train.dense_weights import DenseWeights
from l2vit.train.segmentation import (
    count_with_ranks,
    make_network,
    read_scenes,
)


@cli.program("finetune segment", rank_0_reports=True)
def main(argv: Sequence[str]) -> None:
    """Run the command the command line names."""
    options = _parser().parse_args(argv)
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m finetune.segment", __doc__ or "")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    each = commands.add_parser("evaluate", help="mean IoU on pictures with label maps")
    dense.add_model(each, _evaluate)
    each.add_argument("--images", type=Path, help="pictures; default: the run's own val set")
    each.add_argument("--labels", type=Path, help="folder of their label maps")
    each.add_argument("--out", type=Path, required=True, help="folder for metrics.json")
    each.add_argument("--mode", choices=("whole", "slide"), help="default: as the run evaluates")
    each.add_argument(
        "--save-labels", action="store_true", help="answers as PNG, classes from 1 as ADE20K's"
    )
    each = commands.add_parser("predict", help="colour pictures by class")
    dense.add_model(each, _predict)
    each.add_argument("--images", type=Path, required=True, help="a folder or a picture")
    each.add_argument("--out", type=Path, required=True, help="folder for the drawings")
    each = commands.add_parser("describe", help="parameters and operations of a configuration")
    cli.add_config(each)
    each.set_defaults(run=_describe)
    each.add_argument("--json", default="", metavar="FILE", help="one line of JSON; - prints it")
    each = commands.add_parser("export", help="weights, settings, card and proof in a folder")
    dense.add_model(each, _export)
    each.add_argument(
        "--onnx", type=_size, metavar="HxW", help="also model.onnx for pictures of this size"
    )
    each.add_argument("--out", type=Path, required=True)
    return parser


def _evaluate(options: argparse.Namespace) -> None:
    world = dense.world_of(options.device)
    source = dense.read(options.model, "segment", options.weights)
    data = _data(options, source)
    model: Any = dense.build(source, world.device)
    model.mode = options.mode or model.mode
    folder = dense.make_folder(options.out)
    numbers = inference.share_of(len(data), world.rank, world.size)

    def save(place: int, picture: Tensor, found: Tensor) -> None:
        if options.save_labels:
            name = f"{data.pictures[numbers[place]].stem}.png"
            write_png((found + 1).to(torch.uint8)[None], str(folder / name))

    counts = count_with_ranks(model, data, world=world, show=save)
    if not world.main:
        return
    figures, per_class = counts.figures(), counts.per_class(source.classes)
    record = {
        "model": str(source.path),
        "weights": source.which,
        "data": str(data.pictures[0].parent),
        "pictures": len(data),
        "mode": model.mode,
        "figures": figures,
        "per_class": per_class,
    }
    files.write_json(folder / "metrics.json", record)
    print("   ".join(f"{name} {100 * value:.2f}" for name, value in figures.items()))
    for name, iou in sorted(per_class.items(), key=lambda item: item[1]):
        if iou >= 0:
            print(f"  {name:24} IoU {100 * iou:6.2f}")


def _data(options: argparse.Namespace, source: DenseWeights) -> SceneSet:
    if bool(options.images) != bool(options.labels):
        raise ConfigError("--images and --labels belong together")
    settings = dense.settings_of(source).data
    if options.images:
        places = {"val_images": str(options.images), "val_labels": str(options.labels)}
        settings = dataclasses.replace(settings, **places)
    return read_scenes(settings, "validation")


def _predict(options: argparse.Namespace) -> None:
    world = dense.world_of(options.device)
    source = dense.read(options.model, "segment", options.weights)
    paths = dense.pictures_at(options.images)
    model = dense.build(source, world.device)
    dense.make_folder(options.out)
    for number, (path, picture) in enumerate(dense.read_all(paths)):
        drawn = draw_labels(picture, inference.segment(model, picture), len(source.classes))
        write_png(drawn, str(options.out / f"{number:05d}-{path.stem}.png"))
    cli.tell(f"{len(paths)} pictures in {options.out}")


def _describe(options: argparse.Namespace) -> None:
    settings = tasks.load_config(options.config, options.overrides)
    if not isinstance(settings, SegmentConfig):
        raise ConfigError(f"{options.config}: task is {settings.task}, not segment")
    with torch.device("meta"):
        model = make_network(settings, settings.data.classes)
    dense.print_count(count_segmentor(model), options.json)


def _export(options: argparse.Namespace) -> None:
    source = dense.read(options.model, "segment", options.weights)
    dense.export(source, options.out, onnx_size=options.onnx)


def _size(text: str) -> tuple[int, int]:
    """(height, width) of ``512x512``; both must divide by 32, the last stage's stride."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 512x512")
    if int(height) % 32 or int(width) % 32 or not int(height) or not int(width):
        raise argparse.ArgumentTypeError(f"{text}: height and width must divide by 32")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
