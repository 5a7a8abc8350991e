"""What the order of a run is worth, and what finding a subset costs; no pictures are read.

``mixing``: entropy of the classes in a batch, shards in a batch and displacement between epochs
against a perfect shuffle. ``subset``: seconds to find classes and keys.

    python benchmarks/order.py mixing [--samples 2000000]
    python benchmarks/order.py subset [--samples 100000]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from l2vit.data.config import SubsetConfig
from l2vit.data.manifest import Manifest, Shard
from l2vit.data.order import SampleOrder
from l2vit.data.subset import subset_ids

CLASSES = 21_841
PER_SHARD = 10_000
BYTES = 112_000
"""Of a sample in a shard."""


def uneven_labels(samples: int) -> np.ndarray:
    """(samples,) labels in random order, few classes large and many small, as ImageNet-22k's."""
    rng = np.random.default_rng(0)
    weights = rng.gamma(1.5, size=CLASSES)
    return rng.choice(CLASSES, samples, p=weights / weights.sum())


def entropy(labels: np.ndarray) -> float:
    """Of the classes in one batch, bits."""
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def mixed(epochs: list[np.ndarray], labels: np.ndarray, batch: int) -> tuple[float, ...]:
    """(bits, shards in a batch, displacement in epochs, run of neighbours) of two epochs."""
    batches = epochs[0].reshape(-1, batch)[:: max(1, len(epochs[0]) // batch // 50)]
    bits = np.mean([entropy(labels[ids]) for ids in batches])
    shards = np.mean([len(np.unique(ids // PER_SHARD)) for ids in batches])
    places = np.full((2, len(labels)), -1)
    for row, ids in zip(places, epochs, strict=True):
        row[ids] = np.arange(len(ids))
    both = (places >= 0).all(0)
    moved = np.abs(places[0, both] - places[1, both]).mean() / len(epochs[0])
    breaks = (np.diff(epochs[0].reshape(-1, batch), axis=0) != 1).sum() + batch
    return float(bits), float(shards), float(moved), len(epochs[0]) / breaks


def mixing(options: argparse.Namespace) -> None:
    """Print the table of docs/augmentation.md."""
    labels, batch = uneven_labels(options.samples), options.batch
    counts = [PER_SHARD] * (options.samples // PER_SHARD)
    order = SampleOrder("0", counts, seed=0, chunk=options.chunk, global_batch=batch)
    ours = [order.epoch_ids(epoch) for epoch in (0, 1)]
    rng = np.random.default_rng(1)
    perfect = [rng.permutation(options.samples)[: len(ours[0])] for _ in range(2)]
    print(f"| | bits | shards of {len(counts)} | displacement | run |\n|---|---|---|---|---|")
    for name, epochs, of_sample in (
        ("perfect shuffle", perfect, labels),
        ("ours, shuffled shards", ours, labels),
        ("ours, shards sorted by class", ours, np.sort(labels)),
    ):
        bits, shards, moved, run = mixed(epochs, of_sample, batch)
        print(f"| {name} | {bits:.3f} | {shards:.0f} | {moved:.3f} | {run:.0f} |")


def write_shards(folder: Path, labels: np.ndarray, *, label_files: bool) -> Manifest:
    """Real indexes and labels; the pictures are holes."""
    shards = []
    for number, part in enumerate(labels.reshape(-1, PER_SHARD)):
        tar = folder / f"shard-{number:06d}.tar"
        lines = [f"v1.2 {PER_SHARD}"]
        with tar.open("wb") as stream:
            stream.truncate(PER_SHARD * BYTES)
            for i, label in enumerate(part.tolist()):
                at, key = i * BYTES + 512, f"n{label:08d}_{number * PER_SHARD + i}"
                lines.append(f"jpg {at} 110000 {key}.jpg cls {at + 110_592} 5 {key}.cls")
                os.pwrite(stream.fileno(), b"%05d" % label, at + 110_592)
        tar.with_suffix(".idx").write_text("\n".join(lines) + "\n")
        if label_files:
            part.astype("<u4").tofile(tar.with_suffix(".lab"))
        shards.append(Shard(tar.name, PER_SHARD, PER_SHARD * BYTES, "", ""))
    names = tuple(f"n{i:08d}" for i in range(CLASSES))
    return Manifest("simulated", "train", names, tuple(shards), (0,) * CLASSES)


def subset(options: argparse.Namespace) -> None:
    """Print seconds, best of 3, here and times 14.2 M samples."""
    labels = uneven_labels(options.samples)
    for label_files in (True, False):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            manifest = write_shards(folder, labels, label_files=label_files)
            (folder / "classes").write_text("\n".join(manifest.classes[:5000]))
            keys = (f"n{label:08d}_{i}" for i, label in enumerate(labels[:1000].tolist()))
            (folder / "keys").write_text("\n".join(keys))
            for what, settings in (
                ("5,000 classes", SubsetConfig(classes=str(folder / "classes"))),
                ("1,000 keys left out", SubsetConfig(exclude=str(folder / "keys"))),
            ):
                seconds = []
                for _ in range(3):
                    began = time.perf_counter()
                    subset_ids(settings, folder, manifest, seed=0)
                    seconds.append(time.perf_counter() - began)
                scaled = min(seconds) * 14.2e6 / len(labels)
                kind = "with" if label_files else "without"
                print(f"{what}, {kind} .lab: {min(seconds):.3f} s; 14.2 M: {scaled:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("mixing", "subset"))
    parser.add_argument("--samples", type=int, help=f"a multiple of {PER_SHARD:,}")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=256)
    options = parser.parse_args()
    options.samples = options.samples or {"mixing": 2_000_000, "subset": 100_000}[options.part]
    if options.samples % PER_SHARD:
        parser.error(f"--samples: {options.samples} is no multiple of {PER_SHARD}")
    {"mixing": mixing, "subset": subset}[options.part](options)


if __name__ == "__main__":
    main()
