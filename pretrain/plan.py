"""``python -m pretrain plan``: what a run needs and takes, before it is paid for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from l2vit import cli
from l2vit.data.manifest import MANIFEST_NAME, Manifest
from l2vit.data.storage import is_remote
from l2vit.errors import ConfigError
from l2vit.train import tasks
from l2vit.train.config import TrainConfig

if TYPE_CHECKING:
    from l2vit.plan.estimate import Work


@cli.program("pretrain plan")
def main(argv: Sequence[str]) -> None:
    """Print the plan of a run (see ``--help``); starts nothing and needs no GPU."""
    _run(cli.parse(_parser(), argv))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "python -m pretrain plan",
        "Predict steps, memory, time, cost and disk of a run. Needs no GPU and, with --images and\n"
        "--classes, no data.",
        keys_of=TrainConfig,
    )
    cli.add_config(parser)
    add = parser.add_argument
    add("--gpus", type=int, default=8, help="ranks in all (default 8)")
    add("--per-node", type=int, default=8, help="ranks on a node (default 8)")
    add("--device", default="h100", help="h100, h200, a100 or a YAML file (docs/cluster.md)")
    add("--images", type=int, help="training images; default: data.train's manifest")
    add("--classes", type=int, help="classes; default: data.train's manifest")
    add("--val-images", type=int, help="images of an evaluation; default: data.val's manifest")
    add("--price", type=float, default=0.0, help="money for a GPU-hour")
    add("--compare", metavar="RUN", type=Path, help="a run directory: predicted beside actual")
    add("--json", action="store_true", help="print values for programs")
    return parser


def _run(options: argparse.Namespace) -> None:
    from l2vit.plan import compare, devices, report  # torch: not needed for --help
    from l2vit.plan.estimate import Cluster, estimate

    settings = tasks.load_classification(options.config, options.overrides, program="pretrain plan")
    for name in ("gpus", "per_node"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1")
    cluster = Cluster(devices.find(options.device), options.gpus, options.per_node)
    found = estimate(settings, cluster, _work(options, settings))
    predicted = report.values(found, price=options.price)
    if options.compare:
        actual = compare.measured(options.compare)
        print(json.dumps(actual, indent=1) if options.json else compare.text(predicted, actual))
    elif options.json:
        print(json.dumps(predicted, indent=1))
    else:
        print(report.text(found, price=options.price))


def _work(options: argparse.Namespace, settings: TrainConfig) -> Work:
    """Images and classes: as given, else from the manifests."""
    from l2vit.plan.estimate import Work

    train, val = (_manifest(path) for path in (settings.data.train, settings.data.val))
    images = options.images or (train.samples if train else 0)
    classes = options.classes or (len(train.classes) if train else 0)
    if not (images and classes):
        raise ConfigError(
            f"data.train: no manifest in {settings.data.train!r} yet; give --images and --classes"
        )
    given = options.val_images is not None
    work = Work(images, classes, options.val_images if given else (val.samples if val else 0))
    if train is None:
        return work
    size = sum(shard.bytes for shard in train.shards) / max(1, train.samples)
    return Work(work.images, work.classes, work.val_images, size)


def _manifest(directory: str) -> Manifest | None:
    if is_remote(directory) or (directory and (Path(directory) / MANIFEST_NAME).is_file()):
        return Manifest.load(directory)
    return None
