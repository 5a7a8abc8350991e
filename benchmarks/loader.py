"""Images per CPU-second of the training loaders against timm's and plain webdataset.

All read the same shards of 500 × 375 photographs and do the whole training augmentation (random
resized crop, flip, RandAugment m9-mstd0.5-inc1, normalise, random erasing) at 224 pixels. Each
measurement is a process of its own; the contestants take turns, and the table shows medians. CPU
time is that of the process and all its descendants between two batches, start-up not counted.

    python benchmarks/loader.py
    python benchmarks/loader.py --device cuda --threads 8 --batch 256     # on a GPU: images/s too
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIZE = 224
RAND = "rand-m9-mstd0.5-inc1"
CONTESTANTS = ("ours dali", "ours pil", "timm", "timm prefetcher", "webdataset")


def make_photographs(folder: Path, count: int) -> None:
    """JPEGs cut from scikit-learn's two photographs, of ImageNet's usual size."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(count):
        source = photographs[i % 2]
        width = int(rng.integers(400, source.width))
        height = min(int(width * 0.75), source.height)
        left, top = (
            rng.integers(0, source.width - width),
            rng.integers(0, source.height - height + 1),
        )
        cut = source.crop((left, top, left + width, top + height)).resize((500, 375))
        target = folder / f"class{i % 8}"
        target.mkdir(parents=True, exist_ok=True)
        cut.save(target / f"{i:05d}.jpg", quality=90)


def make_shards(work: Path, count: int) -> Path:
    """Shards of ``count`` photographs by data_prep's own build."""
    make_photographs(work / "images", count)
    command = [sys.executable, "-m", "data_prep", "build", "--dataset", "folder"]
    command += ["--source", str(work / "images"), "--out", str(work / "shards")]
    command += ["--split", "train", "--shard-samples", "64", "--workers", "1"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return next(work.glob("**/manifest.json")).parent


def ours(backend: str, shards: Path, options: argparse.Namespace) -> Iterator[int]:
    import torch

    from l2vit.data.config import AugmentConfig, DataConfig
    from l2vit.data.loader import train_loader
    from l2vit.data.manifest import Manifest
    from l2vit.data.order import Split

    loader = train_loader(
        DataConfig(train=str(shards), backend=backend, threads=options.threads, input_size=SIZE),  # type: ignore[arg-type]
        AugmentConfig(auto_augment=RAND),
        manifest=Manifest.load(shards),
        split=Split(options.batch, 1, 1),
        rank=0,
        seed=0,
        device=torch.device(options.device),
    )
    for batch in loader:
        yield len(batch)


def timms(prefetcher: bool, shards: Path, options: argparse.Namespace) -> Iterator[int]:
    import torch
    from timm.data import create_dataset, create_loader

    dataset = create_dataset(
        "wds/", root=str(shards), split="train", is_training=True, batch_size=options.batch
    )
    loader = create_loader(
        dataset,
        input_size=(3, SIZE, SIZE),
        batch_size=options.batch,
        is_training=True,
        use_prefetcher=prefetcher,
        no_aug=False,
        re_prob=0.25,
        re_mode="pixel",
        hflip=0.5,
        auto_augment=RAND,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        num_workers=options.threads,
        device=torch.device(options.device),
        pin_memory=options.device == "cuda",
    )
    while True:
        for images, _ in loader:
            yield len(images.to(options.device))


def plain_webdataset(shards: Path, options: argparse.Namespace) -> Iterator[int]:
    import webdataset
    from timm.data.auto_augment import rand_augment_transform
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            rand_augment_transform(RAND, {"img_mean": (124, 116, 104), "interpolation": 3}),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            transforms.RandomErasing(0.25, value="random"),
        ]
    )
    dataset = (
        webdataset.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(options.batch, partial=False)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=options.threads)
    while True:
        for images, _ in loader:
            yield len(images.to(options.device))


def cpu_seconds() -> float:
    """CPU time so far of this process and its living descendants."""
    ticks, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # it has ended
        process = int(path.parent.name)
        parents[process] = int(fields[1])
        ticks[process] = sum(map(int, fields[11:15]))
    family = {os.getpid()}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks[p] for p in family if p in ticks) / os.sysconf("SC_CLK_TCK")


def measure(name: str, shards: Path, options: argparse.Namespace) -> dict[str, float]:
    """Images per CPU-second and per second over ``options.images`` images, after a warm-up."""
    import torch

    torch.set_num_threads(1)
    kinds: dict[str, Callable[[], Iterator[int]]] = {
        "ours dali": lambda: ours("dali", shards, options),
        "ours pil": lambda: ours("pil", shards, options),
        "timm": lambda: timms(False, shards, options),
        "timm prefetcher": lambda: timms(True, shards, options),
        "webdataset": lambda: plain_webdataset(shards, options),
    }
    batches = kinds[name]()
    for _ in range(options.warmup):
        next(batches)
    cpu, wall, images = cpu_seconds(), time.perf_counter(), 0
    while images < options.images:
        images += next(batches)
    if options.device == "cuda":
        torch.cuda.synchronize()
    wall = time.perf_counter() - wall
    return {"per_cpu_second": images / (cpu_seconds() - cpu), "per_second": images / wall}


def run_in_turn(shards: Path, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every contestant once a round, each in a fresh process."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for turn in range(options.rounds):
        for name in options.only:
            command = [sys.executable, __file__, "--measure", name, "--shards", str(shards)]
            for key in ("batch", "threads", "images", "warmup", "device"):
                command += [f"--{key}", str(getattr(options, key))]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed with status {done.returncode}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1}: {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    return results


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians as Markdown, with the ratio to the best that is not ours."""
    medians = {
        name: {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        for name, rows in results.items()
    }
    others = [row["per_cpu_second"] for n, row in medians.items() if not n.startswith("ours")]
    best = max(others, default=float("nan"))
    lines = [
        "| loader | images per CPU-second | images/s | to the best other |",
        "|---|---|---|---|",
    ]
    for name, row in medians.items():
        per_cpu = row["per_cpu_second"]
        lines.append(
            f"| {name} | {per_cpu:.0f} | {row['per_second']:.0f} | {per_cpu / best:.2f}× |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=Path, help="shard directory; made if not given")
    parser.add_argument("--photographs", type=int, default=512, help="how many to make")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="threads or worker processes")
    parser.add_argument("--images", type=int, default=1024, help="in one measurement")
    parser.add_argument("--warmup", type=int, default=4, help="batches before it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--measure", choices=CONTESTANTS, help="one measurement, in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.shards, options)), flush=True)
        os._exit(0)  # endless loaders: their workers end with us
    with tempfile.TemporaryDirectory() as work:
        shards = options.shards or make_shards(Path(work), options.photographs)
        print(table(run_in_turn(shards, options)))


if __name__ == "__main__":
    main()
