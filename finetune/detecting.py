"""What ``python -m finetune detect`` does: score, predict, describe, export."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torchvision.io import write_png

from finetune import dense
from finetune.pictures import new_figure, save_figure
from l2vit import cli, files
from l2vit.dense import coco, inference
from l2vit.dense.coco import CocoScores, CocoSet
from l2vit.dense.count import count_detector
from l2vit.dense.drawing import draw_detections
from l2vit.errors import ConfigError
from l2vit.train import tasks
from l2vit.train.dense_config import DetectConfig
from l2vit.train.dense_weights import DenseWeights
from l2vit.train.detection import make_network, score_with_ranks


def _evaluate(options: argparse.Namespace) -> None:
    world = dense.world_of(options.device)
    source = dense.read(options.model, "detect", options.weights)
    data = _data(options, source)
    model = dense.build(source, world.device)
    dense.make_folder(options.out)
    found = score_with_ranks(model, data, options.out, world=world)
    if not world.main:
        return
    per_class = {kind: scores.per_class for kind, scores in found.kinds.items()}
    for kind in found.kinds:
        listed = coco.as_kind(found.entries, kind)
        files.write_text(options.out / f"{kind}.json", json.dumps(listed) + "\n")
    record = {
        "model": str(source.path),
        "weights": source.which,
        "data": str(data.path),
        "pictures": len(data),
        "figures": found.figures,
        "per_class": per_class,
    }
    files.write_json(options.out / "metrics.json", record)
    _draw_curves(found.kinds, options.out / "curves.png")
    _print_scores(found.kinds)


def _data(options: argparse.Namespace, source: DenseWeights) -> CocoSet:
    """The set to score on, with the json's category of each of the model's classes."""
    if bool(options.data) != bool(options.images):
        raise ConfigError("--data and --images belong together")
    places = (options.data, options.images)
    if not options.data:
        places = dense.settings_of(source).data.places("val")
    data = CocoSet.read(*places)
    category = dict(zip(data.names, data.categories, strict=True))
    known = tuple(category.get(name, coco.NO_CATEGORY) for name in source.classes)
    if set(known) == {coco.NO_CATEGORY}:
        raise ConfigError(f"{data.path} has no category in common with {source.path}")
    return dataclasses.replace(data, categories=known)


def _print_scores(kinds: dict[str, CocoScores]) -> None:
    print(f"{'':6}" + "".join(f"{name:>11}" for name in coco.FIGURES))
    for kind, scores in kinds.items():
        values = (scores.figures[name] for name in coco.FIGURES)
        print(f"{kind:6}" + "".join(f"{_percent(value):>11}" for value in values))
    for kind, scores in kinds.items():
        listed = sorted(scores.per_class.items(), key=lambda item: item[1])
        worst = [f"{name} {100 * ap:.1f}" for name, ap in listed if ap >= 0][:5]
        print(f"{kind}: lowest AP: {', '.join(worst) or 'no class occurs'}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if value >= 0 else "-"  # COCO's -1: no object of that size


def _draw_curves(kinds: dict[str, CocoScores], path: Path) -> None:
    """Precision over recall at three overlaps, the mean over the classes that occur."""
    figure = new_figure(6 * len(kinds), 5)
    grid = figure.subplots(1, len(kinds), squeeze=False)[0]
    recall = torch.linspace(0, 1, 101).tolist()
    for axes, (kind, scores) in zip(grid, kinds.items(), strict=True):
        for row in (0, 5, 9):
            axes.plot(recall, scores.precision[row], label=f"IoU {0.5 + 0.05 * row:.2f}")
        axes.set(title=kind, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend()
    save_figure(figure, path)


# -- the other commands


def _predict(options: argparse.Namespace) -> None:
    world = dense.world_of(options.device)
    source = dense.read(options.model, "detect", options.weights)
    paths = dense.pictures_at(options.images)
    model = dense.build(source, world.device)
    dense.make_folder(options.out)
    listed = []
    for number, (path, picture) in enumerate(dense.read_all(paths)):
        found = inference.detect(model, picture)
        drawn = draw_detections(picture, found, source.classes, least=options.least)
        name = f"{number:05d}-{path.stem}.png"
        write_png(drawn, str(options.out / name))
        columns = (found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist())
        for box, score, label in zip(*columns, strict=True):
            entry = {"picture": str(path), "class": source.classes[label]}
            listed.append({**entry, "score": score, "box": box})
    files.write_json(options.out / "detections.json", listed)
    cli.tell(f"{len(paths)} pictures in {options.out}")


def _describe(options: argparse.Namespace) -> None:
    settings = tasks.load_config(options.config, options.overrides)
    if not isinstance(settings, DetectConfig):
        raise ConfigError(f"{options.config}: task is {settings.task}, not detect")
    with torch.device("meta"):
        model = make_network(settings, options.classes)
    dense.print_count(count_detector(model), options.json)


def _export(options: argparse.Namespace) -> None:
    dense.export(dense.read(options.model, "detect", options.weights), options.out)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "evaluate": _evaluate,
    "predict": _predict,
    "describe": _describe,
    "export": _export,
}
