"""Exact accuracy of a model on shards or class folders: what ``finetune evaluate`` does."""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune import datasets, knn, pictures
from finetune.datasets import Dataset
from finetune.scores import Scores
from l2vit import files
from l2vit.data.config import AugmentConfig, DataConfig, EvalConfig, EvalSetConfig
from l2vit.data.loader import eval_loader
from l2vit.errors import ConfigError
from l2vit.models.padding import padding_warnings
from l2vit.train.distributed import World
from l2vit.train.evaluation import evaluate as tally
from l2vit.train.evaluation import restricted
from l2vit.train.weights import Preprocessing, PretrainedWeights, read_pretrained

_NAME = "finetune evaluate"
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """How to run an evaluation; only the precision changes its result."""

    backend: str = "pil"
    batch: int = 64
    threads: int = 2
    precision: str = "fp32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class Result:
    """What an evaluation found."""

    scores: Scores
    loss: float
    seconds: float
    compute_seconds: float
    """Of ``seconds``, the time spent in the model rather than waiting for images."""

    def summary(self) -> dict[str, Any]:
        """Accuracy, calibration and throughput."""
        images = len(self.scores.labels)
        return {
            **self.scores.summary(),
            "loss": self.loss,
            "seconds": self.seconds,
            "images_per_second": images / self.seconds,
            "model_images_per_second": images / max(self.compute_seconds, 1e-9),
        }


def default_device() -> torch.device:
    """The first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen_device(name: str) -> torch.device:
    """The device called ``name`` (empty: the default one).

    Raises:
        ConfigError: no such device here.
    """
    try:
        device = torch.device(name) if name else default_device()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used here: {reason}") from None
    return device


def evaluate_model(
    model: nn.Module, dataset: Dataset, preprocessing: Preprocessing, setting: Setting
) -> Result:
    """Evaluate ``model`` on every image of ``dataset`` once.

    Args:
        model: in evaluation mode, on ``setting.device``.
        dataset: says which outputs count and what is right.
        preprocessing: input size, crop and normalisation.
        setting: how to run.
    """
    scores = Scores(dataset.classes, dataset.accepted)
    loader = _loader(dataset, preprocessing, setting)
    timed = _Timed(_forward(model, dataset, setting), setting.device)
    world = World(0, 1, 0, 1, setting.device, "none")
    began = time.perf_counter()
    try:
        total = tally(timed, loader, world=world, observe=scores.observe)
    finally:
        loader.close()
    seconds = time.perf_counter() - began
    return Result(scores, total.mean_loss, seconds, timed.seconds)


def _loader(dataset: Dataset, preprocessing: Preprocessing, setting: Setting) -> Any:
    if dataset.images:
        return datasets.FolderLoader(
            dataset.images,
            preprocessing,
            batch=setting.batch,
            threads=setting.threads,
            device=setting.device,
        )
    return eval_loader(
        EvalSetConfig(str(dataset.path), preprocessing.input_size, preprocessing.crop_fraction),
        DataConfig(backend=setting.backend, threads=setting.threads),  # type: ignore[arg-type]
        EvalConfig(batch=setting.batch, crop_mode=preprocessing.crop_mode),
        AugmentConfig(mean=preprocessing.mean, std=preprocessing.std),
        device=setting.device,
    )


def _forward(model: nn.Module, dataset: Dataset, setting: Setting) -> Callable[[Tensor], Tensor]:
    dtype = _PRECISIONS[setting.precision]

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(setting.device.type, dtype, enabled=dtype is not None):
            return model(images).float()

    if dataset.columns is None:
        return forward
    return restricted(forward, torch.tensor(dataset.columns, device=setting.device))


class _Timed:
    """A forward pass that adds up its own time, the GPU's included."""

    def __init__(self, forward: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._forward, self._device = forward, device
        self.seconds = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        began = time.perf_counter()
        logits = self._forward(images)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds += time.perf_counter() - began
        return logits


def run(options: argparse.Namespace) -> None:
    """Evaluate as the options of ``finetune.evaluate`` say."""
    if options.batch < 1 or options.threads < 0 or options.input_size < 0:
        raise ConfigError("--batch must be at least 1, --threads and --input-size not negative")
    if options.neighbours < 1:
        raise ConfigError("--neighbours must be at least 1")
    if options.knn and (options.label_set != "data" or options.picture or options.predictions):
        raise ConfigError("--knn goes with none of --label-set, --picture and --predictions")
    for path in filter(None, (options.json, options.picture, options.predictions)):
        if not path.parent.is_dir():
            raise ConfigError(f"no directory {path.parent} to write {path.name} into")
    source = read_pretrained(
        options.model,
        weights=options.weights,
        model=options.name,
        window_size=options.window_size,
        input_size=options.input_size,
    )
    preprocessing = _preprocessing(options, source)
    setting = Setting(
        options.backend,
        options.batch,
        options.threads,
        options.precision,
        chosen_device(options.device),
    )
    model = source.build(window_size=options.window_size, input_size=options.input_size)
    if options.knn:
        _run_knn(options, source, model.to(setting.device), preprocessing, setting)
        return
    dataset = datasets.open_dataset(options.data, source, options.label_set)
    notes = [*_notes(source, dataset), *padding_warnings(model, preprocessing.input_size)]
    for line in notes:
        print(f"{_NAME}: note: {line}", file=sys.stderr)
    result = evaluate_model(model.to(setting.device), dataset, preprocessing, setting)
    _print(source, dataset, preprocessing, result)
    if options.json:
        files.write_json(options.json, _record(options, source, dataset, preprocessing, result))
    if options.picture:
        pictures.accuracy_picture(result.scores, _names(source), options.picture)
    if options.predictions:
        files.write_text(options.predictions, _table(dataset, result.scores))


def _run_knn(
    options: argparse.Namespace,
    source: PretrainedWeights,
    model: nn.Module,
    preprocessing: Preprocessing,
    setting: Setting,
) -> None:
    """Print, and write as JSON, the accuracy of the nearest neighbours among ``--knn``."""
    known, asked = datasets.open_plain(options.knn), datasets.open_plain(options.data)
    rows = datasets.same_classes(asked, known)
    dtype = _PRECISIONS[setting.precision]
    bank = knn.features(model, _loader(known, preprocessing, setting), dtype)
    queries = knn.features(model, _loader(asked, preprocessing, setting), dtype)
    votes = knn.votes(
        bank, queries.features, classes=len(known.classes), neighbours=options.neighbours
    )
    wanted = torch.tensor(rows, device=votes.device)[queries.labels]
    right, count = int((votes.argmax(1) == wanted).sum()), len(wanted)
    print(f"model    {source.model} ({source.described}) from {source.path}")
    print(f"bank     {len(bank.labels)} pictures, {len(known.classes)} classes of {options.knn}")
    print(f"data     {options.data} at {preprocessing.input_size}x{preprocessing.input_size}")
    print(
        f"{options.neighbours}-NN    {100 * right / count:.3f}%  ({right} of {count})", flush=True
    )
    if options.json:
        record = {
            "model": str(source.path),
            "weights": source.which,
            "bank": str(options.knn),
            "bank_count": len(bank.labels),
            "data": str(options.data),
            "input_size": preprocessing.input_size,
            "neighbours": options.neighbours,
            "count": count,
            "knn_right": right,
            "knn": 100 * right / count,
        }
        files.write_json(options.json, record)


def _preprocessing(options: argparse.Namespace, source: PretrainedWeights) -> Preprocessing:
    changed = {
        "input_size": options.input_size,
        "crop_fraction": options.crop_fraction,
        "crop_mode": options.crop_mode,
    }
    return replace(source.preprocessing, **{k: v for k, v in changed.items() if v})


def _notes(source: PretrainedWeights, dataset: Dataset) -> Iterator[str]:
    yield from (line for line in (source.note, dataset.assumption) if line)
    if dataset.columns is not None:
        unknown = [c for c, row in zip(dataset.classes, dataset.columns, strict=True) if row < 0]
        yield f"answers restricted to the {len(dataset.columns)} classes of the label set"
        if unknown:
            yield (
                f"the model does not know {len(unknown)} of them (first: {unknown[0]}): their"
                " images count as wrong"
            )


def _print(
    source: PretrainedWeights, dataset: Dataset, preprocessing: Preprocessing, result: Result
) -> None:
    found = result.summary()
    print(f"model    {source.model} ({source.described}) from {source.path}")
    print(f"data     {dataset.path} at {preprocessing.input_size}x{preprocessing.input_size}")
    print(f"top-1    {found['top1']:.3f}%  ({found['top1_right']} of {found['count']})")
    print(f"top-5    {found['top5']:.3f}%  ({found['top5_right']} of {found['count']})")
    print(f"count    {found['count']}")
    print(f"loss     {found['loss']:.4f}   calibration error {100 * found['ece']:.2f}%")
    print(
        f"speed    {found['images_per_second']:.1f} images/s"
        f" (model alone {found['model_images_per_second']:.1f})",
        flush=True,
    )


def _names(source: PretrainedWeights) -> dict[str, str]:
    return dict(zip(source.classes, source.class_names, strict=False))


def _record(
    options: argparse.Namespace,
    source: PretrainedWeights,
    dataset: Dataset,
    preprocessing: Preprocessing,
    result: Result,
) -> dict[str, Any]:
    reliability = result.scores.reliability()
    names = _names(source)
    return {
        "model": str(source.path),
        "architecture": source.model,
        "weights": source.which,
        "weights_choice": source.choice,
        "data": str(dataset.path),
        "manifest_hash": dataset.identity,
        "label_set": options.label_set,
        "input_size": preprocessing.input_size,
        "window_size": options.window_size or source.model_args.get("window_size"),
        "crop_fraction": preprocessing.crop_fraction,
        "crop_mode": preprocessing.crop_mode,
        "precision": options.precision,
        "backend": "folder" if dataset.images else options.backend,
        **result.summary(),
        "reliability": {
            "counts": reliability.counts.tolist(),
            "confidence": reliability.confidence.tolist(),
            "accuracy": reliability.accuracy.tolist(),
        },
        "per_class": [
            {**entry, "name": names.get(entry["class"], "")} for entry in result.scores.per_class()
        ],
    }


def _table(dataset: Dataset, scores: Scores) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", "answer", "confidence"])
    rows = zip(scores.ids, scores.labels, scores.answers[:, 0], scores.confidence, strict=True)
    for number, label, answer, confidence in sorted(rows):
        name, classes = dataset.names[number], dataset.classes
        writer.writerow([name, classes[label], classes[answer], f"{confidence:.6f}"])
    return text.getvalue()
