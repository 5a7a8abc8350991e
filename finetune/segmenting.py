"""What ``python -m finetune segment`` does: score, predict, describe, export."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
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


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "evaluate": _evaluate,
    "predict": _predict,
    "describe": _describe,
    "export": _export,
}
