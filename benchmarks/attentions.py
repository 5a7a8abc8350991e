"""Every attention of this package in one backbone: time, memory, and two properties of the rows.

`python benchmarks/attentions.py --out DIR` writes attentions.json, attentions.md, attentions.png.
The JSON file grows with every measurement; the same command goes on where an earlier one stopped.

The backbone is DeiT-Tiny (12 blocks, 192 channels); images of 224 to 1,792 pixels make 196 to
12,544 tokens, and a class token. Each attention comes as its paper has it: enhanced with its 3×3
local concentration, injective with 6 heads. Rounds go through all attentions in turn, each pass in
a fresh process. On a CPU time is the process's CPU time, which other programs disturb least. Memory
is what a pass adds at its peak: allocated bytes on a GPU, resident bytes on a CPU.

The properties (attention_rows.py) are measured on a small backbone, random and trained.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import attention_figure
import attention_rows
import torch

from l2vit import cli, files
from l2vit.errors import ConfigError, UserError
from l2vit.models.families.base import ATTENTIONS
from l2vit.models.families.deit import Deit

NAMES = [name for name in ATTENTIONS if name != "leaky"]  # costs what linear costs
TOKENS = (196, 784, 3136, 12544)
MODES = ("forward", "training")
OWN: dict[str, dict[str, Any]] = {"injective": {"num_heads": 6}, "enhanced": {"lcm_kernel": 3}}
LONG = 3.0  # seconds: a pass this long is taken once a round, without a warm-up
VERY_LONG = 20.0  # and this long in one round only
FRESH = multiprocessing.get_context("forkserver")  # torch imported once for all processes
FRESH.set_forkserver_preload(["l2vit.models.families.deit", "torch"])


def main() -> int:
    options = _parser().parse_args()
    return cli.run(lambda: run(options), program="benchmarks/attentions.py")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/benchmarks"))
    add("--attentions", nargs="*", choices=list(ATTENTIONS), default=NAMES)
    add("--tokens", nargs="*", type=int, default=list(TOKENS), help="squares")
    add("--modes", nargs="*", choices=MODES, default=list(MODES))
    add("--batch", type=int, default=1)
    add("--rounds", type=int, default=3, help="over all attentions in turn")
    add("--depth", type=int, default=12, help="blocks of the backbone")
    add("--threads", type=int, default=1, help="on a CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=180.0, help="a longer pass is skipped, and said so")
    add("--lock", type=Path, help="file to lock for each timing: benchmarks then take turns")
    add("--epochs", type=int, default=20, help="on the digits; -1 leaves the properties out")
    add("--images", type=int, default=64, help="for the properties")
    add("--note", default="", help="about the machine, such as: shared with other work")
    return parser


def run(options: argparse.Namespace) -> None:
    """Measure what is not yet on disk, then draw and print everything."""
    odd = [tokens for tokens in options.tokens if tokens < 1 or math.isqrt(tokens) ** 2 != tokens]
    if odd:
        raise ConfigError(f"--tokens {odd[0]}: an image has a square number of patches")
    options.out.mkdir(parents=True, exist_ok=True)
    book = Book(options.out / "attentions.json", settings(options))
    if options.epochs >= 0:
        measure_properties(book, options)
    measure_costs(book, options)
    text = attention_figure.tables(book.found)
    files.write_text(options.out / "attentions.md", text)
    attention_figure.picture(book.found, options.out / "attentions.png")
    print(text)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for figures to stand in one table."""
    if options.device == "cuda":
        machine, threads = torch.cuda.get_device_name(), 0
    else:
        machine, threads = f"{_processor()}, {os.cpu_count()} cores", options.threads
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    kept = {key: getattr(options, key) for key in ("batch", "depth", "device", "note")}
    return {"machine": machine, "threads": threads, **kept, **versions}


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return platform.machine()


class Book:
    """The measurements so far, on disk after each one."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {"settings": settings, "cost": [], "properties": []}
        if path.exists():
            self.found = files.read_json(path, what="earlier measurements")
            if self.found["settings"] != settings:
                raise UserError(f"{path} was measured with other settings: choose another --out")

    def row(self, table: str, **key: Any) -> dict[str, Any]:
        """The row with these values, empty but for them if there was none."""
        for row in self.found[table]:
            if key.items() <= row.items():
                return row
        return dict(key)

    def keep(self, table: str, row: dict[str, Any]) -> None:
        """Write ``row``, new or changed, to the disk."""
        if not any(row is other for other in self.found[table]):
            self.found[table].append(row)
        files.write_json(self.path, self.found)


# ---------------------------------------------------------------- time and memory


def measure_costs(book: Book, options: argparse.Namespace) -> None:
    """Rounds over all cells, small ones first; a cell that cannot be afforded says why."""
    plan = list(
        itertools.product(
            range(options.rounds), sorted(options.tokens), options.modes, options.attentions
        )
    )
    began, spent = time.monotonic(), 0.0
    for index, (turn, tokens, mode, name) in enumerate(plan):
        row = book.row("cost", attention=name, mode=mode, tokens=tokens)
        if is_done(row, turn):
            continue
        reason = cannot(expected(book, name, mode, tokens), options) if turn == 0 else ""
        found = {"skipped": reason} if reason else in_own_process(name, tokens, mode, options)
        if "skipped" in found:
            row["skipped"] = found["skipped"]
        else:
            spent += passes(found["seconds"]) * found["seconds"]
            for key, value in found.items():
                row.setdefault(key, []).append(value)
        book.keep("cost", row)
        left = sum(
            passes(guess[0]) * guess[0]
            for later, size, way, who in plan[index + 1 :]
            if (guess := expected(book, who, way, size))
            and not is_done(book.row("cost", attention=who, mode=way, tokens=size), later)
        )
        pace = (time.monotonic() - began) / max(spent, 0.1)
        print(
            f"[{index + 1}/{len(plan)}] {name} {mode} {tokens}: {attention_figure.cell(row)};"
            f" about {left * pace / 60:.0f} min of timing left",
            flush=True,
        )


def is_done(row: dict[str, Any], turn: int) -> bool:
    """Whether a cell needs nothing in round ``turn`` (from 0)."""
    samples = row.get("seconds", [])
    return (
        "skipped" in row
        or len(samples) > turn
        or (turn > 0 and max(samples, default=0.0) > VERY_LONG)
    )


def passes(seconds: float) -> int:
    """How many passes :func:`measure` takes when one lasts ``seconds``."""
    return 1 if seconds > LONG else 3


def expected(book: Book, name: str, mode: str, tokens: int) -> tuple[float, float] | None:
    """Seconds and bytes of a pass as measured, else a·n + b·n² through the two next smaller sizes;
    None without any."""
    points = {
        row["tokens"]: row
        for row in book.found["cost"]
        if (row["attention"], row["mode"]) == (name, mode) and "seconds" in row
    }
    sizes = sorted(size for size in points if size <= tokens)[-2:]
    if not sizes:
        return None
    guesses = []
    for key in ("seconds", "bytes"):
        x, y = sizes[-1], statistics.median(points[sizes[-1]][key])
        bend = 0.0
        if len(sizes) == 2:
            bend = max(y / x - statistics.median(points[sizes[0]][key]) / sizes[0], 0.0)
            bend /= x - sizes[0]
        guesses.append(tokens * (y / x + bend * (tokens - x)))
    return guesses[0], guesses[1]


def cannot(guess: tuple[float, float] | None, options: argparse.Namespace) -> str:
    """Why a pass is not worth trying; empty if it is."""
    if guess is None:
        return ""
    if guess[0] > options.seconds:
        return f"skipped: would take about {guess[0]:.0f} s a pass"
    free = _free(options.device)
    if guess[1] > free:
        return f"skipped: would need about {guess[1] / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
    return ""


def _free(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


def in_own_process(
    name: str, tokens: int, mode: str, options: argparse.Namespace
) -> dict[str, Any]:
    """:func:`measure` in a fresh process, so that peaks and out-of-memory stay apart."""
    try:
        with turn_of(options.lock), ProcessPoolExecutor(1, mp_context=FRESH) as pool:
            return pool.submit(measure, name, tokens, mode, options).result()
    except (RuntimeError, MemoryError, BrokenProcessPool) as error:
        lines = str(error).strip().splitlines()
        return {"skipped": f"failed: {lines[0][:100] if lines else type(error).__name__}"}


@contextlib.contextmanager
def turn_of(lock: Path | None) -> Iterator[None]:
    """Hold an exclusive lock on a file, if one is given."""
    if lock is None:
        yield
        return
    with lock.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def measure(name: str, tokens: int, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a pass, and the bytes it adds at its peak."""
    torch.set_num_threads(options.threads)
    side = 16 * round(tokens**0.5)
    # A tiny pass first: what libraries allocate once is no cost of the attention.
    for size in (32, side):
        torch.manual_seed(0)
        model = Deit(size, depth=options.depth, attention=name, **OWN.get(name, {}))
        model.to(options.device).train(mode == "training")
        images = torch.randn(options.batch, 3, size, size, device=options.device)
        before = _start_peak(options.device)
        first = _pass(model, images, mode, options.device)
    added = _peak(options.device) - before
    samples = [first]
    if first <= LONG:
        samples = [_pass(model, images, mode, options.device) for _ in range(passes(first) - 1)]
    return {"seconds": statistics.median(samples), "bytes": added}


def _pass(model: Deit, images: torch.Tensor, mode: str, device: str) -> float:
    """Seconds of a forward pass, or of a forward and a backward one."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    if mode == "forward":
        with torch.no_grad():
            model(images)
    else:
        model(images).sum().backward()
        model.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _start_peak(device: str) -> int:
    """Begin a new peak; the bytes in use now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


# ---------------------------------------------------------------- properties


def measure_properties(book: Book, options: argparse.Namespace) -> None:
    """Rows for random and trained weights of every attention that weighs tokens."""
    for name in options.attentions:
        if name == "xca":  # weighs channels
            continue
        key = {"attention": name, "images": options.images, "epochs": options.epochs}
        if "trained" in (row := book.row("properties", **key)):
            continue
        began = time.monotonic()
        model = attention_rows.small_backbone(name, OWN.get(name, {}))
        images, _ = attention_rows.digits()
        row["random"] = attention_rows.observe(model, images[-options.images :])
        row["accuracy"] = attention_rows.train(model, options.epochs)
        row["trained"] = attention_rows.observe(model, images[-options.images :])
        book.keep("properties", row)
        print(f"{name}: {row['accuracy']:.1f}% of the digits,", end=" ")
        print(f"properties in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
