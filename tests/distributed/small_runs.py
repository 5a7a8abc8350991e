"""Runs of a few seconds over real shards, for the tests of the engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

CLASSES = 4
SETTINGS = {
    "model": {"name": "engine_small_net", "drop_path_rate": 0.2},
    "schedule": {"global_batch": 16, "length": "24 steps", "warmup": "4 steps"},
    "optim": {"lr": 5e-3},
    "data": {"backend": "host", "threads": 0, "input_size": 16, "chunk": 4},
    "augment": {"auto_augment": "", "scale": [0.5, 1.0], "label_smoothing": 0.0},
    "engine": {"channels_last": False},
    "ema": {"decay": 0.9},
    "eval": {"every": "8 steps", "batch": 16, "crop_fraction": 1.0},
    "checkpoint": {"every": "4 steps"},
    "faults": {"hang_seconds": 60},
    "log": {"every": 1},
}


def build_shards(folder: Path, count: int = 120) -> Path:
    """Shards of ``count`` coloured 40×40 pictures in four classes; train and val beneath."""
    from data_prep.__main__ import main

    generator = np.random.default_rng(5)
    for i in range(count):
        label = i % CLASSES
        pixels = generator.integers(0, 120, (40, 40, 3))
        pixels[..., label % 3] += 40 * (1 + label // 3)
        path = folder / "raw" / f"c{label}" / f"p{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    arguments = ["build", "--dataset", "folder", "--source", str(folder / "raw")]
    arguments += ["--out", str(folder / "shards"), "--split", "both", "--val-fraction", "0.2"]
    assert main([*arguments, "--shard-bytes", "64K", "--workers", "1"]) == 0
    return folder / "shards"


def settings(shards: Path, run: Path, **changes) -> Path:
    """Write the YAML of a small run; ``changes`` are dotted keys with ``__`` for the dot."""
    tree = json.loads(json.dumps(SETTINGS))
    tree["run"] = {"dir": str(run)}
    tree["data"] |= {"train": str(shards / "train"), "val": str(shards / "val")}
    for key, value in changes.items():
        node = tree
        *parents, leaf = key.split("__")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def train(path):
    """What a rank does: the program's main on the configuration ``path``; its exit status."""
    import small_net  # noqa: F401  registers the network

    from l2vit import cli
    from pretrain.train import main

    report = os.environ.get("RANK", "0") == "0"
    arguments = ["--config", str(path)]
    return cli.run(lambda: main(arguments), program="pretrain train", report=report)


def records(run: Path) -> list[dict]:
    """The training records of ``run``: those with a loss."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    return {record["step"]: record["loss"] for record in records(run)}
