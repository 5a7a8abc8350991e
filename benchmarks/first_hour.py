"""The README's three commands for one's own images against a loop of timm's parts.

A folder of 100 classes is drawn. Ours is what a newcomer types: build, train, export. The other is
a plain loop of timm's create_loader, create_optimizer_v2, cosine schedule, Mixup and ModelEmaV3 on
the same folder and the same model, for the CPU time our training command took, all it started and
its imports included. timm's own validation loader then measures both, and of timm's two sets of
weights the better one counts. Seeds take turns, and the table shows means.

    python benchmarks/first_hour.py
    python benchmarks/first_hour.py --only start     # how soon the commands answer
    python benchmarks/first_hour.py --tiny           # every step once, in seconds: no result
"""

from __future__ import annotations

import argparse
import colorsys
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "pretrain/configs/my_folder.yaml"
SHAPES = 4
HUES = 5
SIDE = 64
BATCH = 64
LIGHT = {"scale": (0.08, 1.0), "hflip": 0.5, "color_jitter": 0.4}
"""What timm's train.py does to images when nothing is asked of it."""
ADVISED = {
    "scale": (0.08, 1.0),
    "hflip": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.25,
    "re_mode": "pixel",
}
"""What timm's documentation advises for transformers, with the mixing of ``MIXUP``."""
MIXUP = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch_prob": 0.5}


@dataclass(frozen=True)
class Size:
    """What both sides train."""

    model: str = "l2vit_mini"
    window: int = 4
    input_size: int = 32
    classes: int = SHAPES * HUES * HUES
    train: int = 20
    val: int = 10
    epochs: int = 10
    batch: int = BATCH

    @property
    def overrides(self) -> list[str]:
        """What is added to the README's command, so that two cores are enough."""
        return [
            f"model.name={self.model}",
            f"model.window_size={self.window}",
            f"data.input_size={self.input_size}",
            f"schedule.length={self.epochs} epochs",
        ]


TINY = Size(classes=4, train=20, val=2, epochs=6)


# -- the images


def draw(label: int, rng: np.random.Generator) -> Any:
    """A shape in one colour on a cluttered ground in another; these three make the class."""
    from PIL import Image, ImageDraw

    rest, shape = divmod(label, SHAPES)
    ground, front = divmod(rest, HUES)
    small = np.array([_colour(ground, rng) for _ in range(64)], np.uint8).reshape(8, 8, 3)
    image = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        ends = [float(v) for v in rng.uniform(0, SIDE, 4)]
        pen.line(ends, fill=tuple(int(v) for v in rng.integers(0, 255, 3)), width=2)
    radius = rng.uniform(0.25, 0.45) * SIDE
    center, turn = rng.uniform(radius, SIDE - radius, 2), rng.uniform(-0.3, 0.3)
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    fill = _colour(front, rng)
    for outline in OUTLINES[shape]:
        pen.polygon([tuple(p) for p in (center + radius * outline @ turned).tolist()], fill=fill)
    noisy = np.asarray(image) + rng.normal(0, 8, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _colour(hue: int, rng: np.random.Generator) -> tuple[int, int, int]:
    value = ((hue + rng.uniform(-0.2, 0.2)) / HUES) % 1
    red, green, blue = colorsys.hsv_to_rgb(value, rng.uniform(0.6, 1), rng.uniform(0.6, 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def _star(points: int, inner: float) -> np.ndarray:
    angle = np.pi * np.arange(2 * points) / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _bar(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


OUTLINES = (
    [_star(12, 1.0)],
    [_star(5, 0.4)],
    [_bar(-1, -0.8, 1, -0.2), _bar(-1, 0.2, 1, 0.8)],
    [_bar(-1, -0.2, 1, 0.2), _bar(-0.2, -1, 0.2, 1)],
)
"""Polygons in the unit circle: a disc, a star, two bars, a cross."""


def make_images(folder: Path, size: Size) -> None:
    """``train/`` and ``val/`` with one folder of JPEGs a class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", size.train), ("val", size.val)):
        for label in range(size.classes):
            target = folder / part / f"class{label:03d}"
            target.mkdir(parents=True)
            for i in range(count):
                draw(label, rng).save(target / f"{i:03d}.jpg", quality=92)


# -- ours


def run(command: list[str]) -> float:
    """CPU seconds of a command and of all it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stdout.decode()[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def build(images: Path, shards: Path) -> float:
    """The README's first command."""
    command = [sys.executable, "-m", "data_prep", "build", "--dataset", "folder"]
    return run([*command, "--source", str(images), "--out", str(shards)])


def train_command(shards: Path, out: Path, *overrides: str) -> list[str]:
    """The README's second command, with directories that are not its own."""
    command = ["bash", "launch/pretrain.sh", "--config", RECIPE]
    command += [f"data.train={shards}/train", f"data.val={shards}/val", f"run.dir={out}"]
    return [*command, *overrides]


def ours(shards: Path, work: Path, seed: int, size: Size) -> dict[str, Any]:
    """The README's second and third command; the CPU time is that of the second."""
    out, export = work / f"run-{seed}", work / f"export-{seed}"
    trained = run(train_command(shards, out, *size.overrides, f"run.seed={seed}"))
    command = [sys.executable, "-m", "finetune.export_timm"]
    exported = run([*command, "--checkpoint", str(out), "--out", str(export)])
    return {"cpu_seconds": trained, "export_cpu_seconds": exported, "export": str(export)}


# -- timm's


def timm_loop(images: Path, seed: int, seconds: float, size: Size, light: bool) -> dict[str, Any]:
    """Train with timm's parts for ``seconds`` of this process's CPU time."""
    import timm
    import torch
    from timm.data import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    import l2vit  # noqa: F401

    torch.manual_seed(seed)
    np.random.seed(seed)
    window = {"window_size": size.window} if size.model.startswith("l2vit") else {}
    model = timm.create_model(
        size.model, num_classes=size.classes, drop_path_rate=0.1, img_size=size.input_size, **window
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05)
    average = ModelEmaV3(model, decay=0.9998, use_warmup=True)
    mixup = None if light else Mixup(**MIXUP, label_smoothing=0.1, num_classes=size.classes)
    criterion = LabelSmoothingCrossEntropy(0.1) if light else SoftTargetCrossEntropy()
    loader = _training_loader(images, size, LIGHT if light else ADVISED)
    epochs, epoch, update = size.epochs, 0, 0
    schedule = _cosine(optimizer, epochs, len(loader))
    while epoch < epochs:
        began = time.process_time()
        for pictures, labels in loader:
            pictures, targets = mixup(pictures, labels) if mixup else (pictures, labels)
            loss = criterion(model(pictures), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update += 1
            average.update(model, step=update)
            schedule.step_update(update)
        epoch += 1
        if epoch == 2:  # within the warm-up, which no length changes
            spent, each = time.process_time(), time.process_time() - began
            epochs = max(2, epoch + int((seconds - spent) / each))
            schedule = _cosine(optimizer, epochs, len(loader))
    used = time.process_time()
    found = {"raw": accuracy(model, images / "val", size)}
    found["ema"] = accuracy(average.module, images / "val", size)
    return {"epochs": epochs, "cpu_seconds": used, **found, "top1": max(found.values())}


def _cosine(optimizer: Any, epochs: int, updates: int) -> Any:
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(
        optimizer,
        t_initial=epochs * updates,
        lr_min=1e-6,
        warmup_t=5 * updates,
        warmup_lr_init=1e-6,
        t_in_epochs=False,
    )


def _training_loader(images: Path, size: Size, augmentation: dict[str, Any]) -> Any:
    from timm.data import create_dataset, create_loader

    return create_loader(
        create_dataset("", root=str(images), split="train", is_training=True),
        input_size=(3, size.input_size, size.input_size),
        batch_size=size.batch,
        is_training=True,
        no_aug=False,
        interpolation="random",
        num_workers=0,  # so that all its CPU time is this process's
        use_prefetcher=False,
        persistent_workers=False,
        **augmentation,
    )


# -- measuring both alike


def accuracy(model: Any, folder: Path, size: Size) -> float:
    """Top-1 in percent by timm's validation loader: bicubic, centre crop of 0.875."""
    import torch
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(folder)),
        input_size=(3, size.input_size, size.input_size),
        batch_size=100,
        interpolation="bicubic",
        crop_pct=0.875,
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
    )
    model.eval()
    with torch.inference_mode():
        right = [(model(x).argmax(1) == y).float() for x, y in loader]
    return round(100 * torch.cat(right).mean().item(), 2)


def answer(task: str, *arguments: str) -> dict[str, Any]:
    """One contestant or measurement, as a process of its own."""
    command = [sys.executable, __file__, task, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return result


def compare(
    images: Path, shards: Path, work: Path, seeds: int, size: Size, light: bool
) -> dict[str, Any]:
    """Both sides for every seed in turn; means at the end."""
    runs: list[dict[str, Any]] = []
    tiny = ["--tiny"] if size == TINY else []
    for seed in range(seeds):
        mine = ours(shards, work, seed, size)
        mine |= answer("score", mine["export"], str(images / "val"), *tiny)
        runs.append({"side": "ours", "seed": seed, **mine})
        print(f"seed {seed} ours: {mine}", flush=True)
        for side in ("advised", "light") if light else ("advised",):
            seconds = 0.0 if tiny else mine["cpu_seconds"]
            given = ["timm", str(images), str(seed), f"{seconds:.1f}", side]
            theirs = answer(*given, *tiny)
            runs.append({"side": f"timm {side}", "seed": seed, **theirs})
            print(f"seed {seed} timm {side}: {theirs}", flush=True)
    sides = dict.fromkeys(r["side"] for r in runs)
    means = {s: statistics.mean(r["top1"] for r in runs if r["side"] == s) for s in sides}
    print("\n| | top-1, mean | seeds | CPU seconds |\n|---|---|---|---|")
    for side in sides:
        own = [r for r in runs if r["side"] == side]
        each = " / ".join(f"{r['top1']:.1f}" for r in own)
        seconds = statistics.mean(r["cpu_seconds"] for r in own)
        print(f"| {side} | {means[side]:.1f}% | {each} | {seconds:.0f} |")
    return {"runs": runs, "means": means}


# -- how soon the commands answer


def start(shards: Path, work: Path, size: Size) -> dict[str, float]:
    """Wall and CPU seconds from the command to its first training line, and to a refusal."""
    command = train_command(shards, work / "started", *size.overrides)
    first = _until(r"step +1\b|step 1/", command)
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([*command, "optim.lrr=1"], cwd=ROOT, stderr=subprocess.DEVNULL)
    refused = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    return {
        **first,
        "refusal_seconds": time.monotonic() - began,
        "refusal_cpu_seconds": refused,
    }


def _until(pattern: str, command: list[str]) -> dict[str, float]:
    """Seconds until a line matches; then the command is stopped by a signal."""
    import psutil

    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    found: dict[str, float] = {}
    for line in process.stdout:
        if not found and re.search(pattern, line):
            found["first_line_seconds"] = time.monotonic() - began
            parent = psutil.Process(process.pid)
            times = [p.cpu_times() for p in (parent, *parent.children(recursive=True))]
            found["first_line_cpu_seconds"] = sum(t.user + t.system for t in times)
            process.terminate()
    process.wait()
    if not found:
        sys.exit(f"no line matches {pattern}")
    return found


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("accuracy", "start"))
    parser.add_argument("--light", action="store_true", help="timm's train.py by default, too")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = TINY if options.tiny else Size()
    match options.task:
        case ["timm", images, seed, seconds, side]:
            light = side == "light"
            found = timm_loop(Path(images), int(seed), float(seconds), size, light)
            print(json.dumps(found))
            return
        case ["score", export, folder]:
            import timm

            import l2vit  # noqa: F401

            model = timm.create_model(f"local-dir:{export}", pretrained=True)
            print(json.dumps({"top1": accuracy(model, Path(folder), size)}))
            return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_images(work / "images", size)
        found = {"build_cpu_seconds": build(work / "images", work / "shards")}
        if options.only != "accuracy":
            found |= start(work / "shards", work, size)
        print(json.dumps(found), flush=True)
        if options.only != "start":
            seeds = 1 if options.tiny else options.seeds
            found |= compare(work / "images", work / "shards", work, seeds, size, options.light)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
