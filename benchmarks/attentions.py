"""Every attention of this package in one host: time and memory against tokens, and two properties.

`python benchmarks/attentions.py --out DIR` writes attentions.json, attentions.md, attentions.png.

The host is DeiT-Tiny (12 blocks, 192 channels); images of 224 to 1,792 pixels make 196 to 12,544
tokens, and a class token. Each measurement has a process of its own. Memory is what a forward or
training pass adds at its peak: allocated bytes on a GPU, resident bytes on a CPU.

The properties are what the papers argue about. Concentration: entropy of the rows of attention
weights over that of a uniform row (of absolute values where weights are signed). Injectivity: the
share of queries whose row stays the same (within 1e-3) when the query is doubled, and the share of
pairs of different queries of one image with the same row. Both on random weights and on weights
trained on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2vit import files
from l2vit.models.attentions import CORES
from l2vit.models.host_deit import Deit, TokenProjected

TOKENS = (196, 784, 3136, 12544)
MODES = ("forward", "training")
HEADS = {"injective": 6}  # InLine's own head count in this host; the others have DeiT's 3
SAME = 1e-3
SMALL = {"img_size": 112, "embed_dim": 96, "depth": 4, "num_heads": 3}


def main() -> int:
    options = _parser().parse_args()
    if options.cell:
        attention, tokens, mode = options.cell
        print(json.dumps(measure(attention, int(tokens), mode, options)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.attentions or list(CORES)
    found: dict[str, Any] = {"machine": machine(options.device), "batch": options.batch}
    found["cost"] = list(cost(names, options))
    if options.epochs >= 0:
        found["properties"] = [row for name in names for row in properties(name, options)]
    files.write_json(options.out / "attentions.json", found)
    files.write_text(options.out / "attentions.md", tables(found))
    picture(found, options.out / "attentions.png")
    print(tables(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/benchmarks"))
    add("--attentions", nargs="*", choices=list(CORES), help="default: all")
    add("--tokens", nargs="*", type=int, default=list(TOKENS), help="squares")
    add("--modes", nargs="*", choices=MODES, default=list(MODES))
    add("--batch", type=int, default=1)
    add("--repeats", type=int, default=5)
    add("--depth", type=int, default=12, help="blocks of the host")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=600.0, help="limit of one measurement")
    add("--epochs", type=int, default=10, help="on the digits; -1 leaves the properties out")
    add("--images", type=int, default=32, help="for the properties")
    add("--cell", nargs=3, help=argparse.SUPPRESS)
    return parser


def machine(device: str) -> str:
    """The hardware in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


# ---------------------------------------------------------------- time and memory


def cost(names: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each attention, mode and number of tokens; what failed says why."""
    for name in names:
        for mode in options.modes:
            for tokens in options.tokens:
                row = {"attention": name, "mode": mode, "tokens": tokens}
                yield {**row, **in_own_process(name, tokens, mode, options)}


def in_own_process(
    name: str, tokens: int, mode: str, options: argparse.Namespace
) -> dict[str, Any]:
    """The measurement in a fresh interpreter, so that peaks and out-of-memory stay apart."""
    kept = ("batch", "repeats", "depth", "device")
    flags = [f"--{key}={getattr(options, key)}" for key in kept]
    command = [sys.executable, __file__, "--cell", name, str(tokens), mode, *flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {options.seconds:.0f} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1][:120] if lines else f"status {done.returncode}"}
    return json.loads(done.stdout)


def measure(name: str, tokens: int, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a pass, and the bytes it adds at its peak."""
    side = 16 * round(tokens**0.5)
    torch.manual_seed(0)
    model = Deit(side, depth=options.depth, num_heads=HEADS.get(name, 3), attention=name)
    model.to(options.device).train(mode == "training")
    images = torch.randn(options.batch, 3, side, side, device=options.device)

    def once() -> float:
        start = time.perf_counter()
        if mode == "forward":
            with torch.no_grad():
                model(images)
        else:
            model(images).sum().backward()
            model.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    before = _bytes(options.device)
    first = once()
    repeats = options.repeats if first < 5 else 1  # a long pass varies little
    seconds = statistics.median(once() for _ in range(repeats))
    return {"seconds": seconds, "bytes": _bytes(options.device) - before}


def _bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # getrusage would count the parent's peak, which fork hands down.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ---------------------------------------------------------------- properties


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits as (B, 3, 112, 112) in [−1, 1], and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (SMALL["img_size"],) * 2, mode="bilinear")
    return images.expand(-1, 3, -1, -1), torch.tensor(data.target)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> float:
    """Plain AdamW on all but the last 297 digits; returns the accuracy on those in percent."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    steps = epochs * (1500 // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(steps, 1))
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for ids in torch.randperm(1500, generator=generator).split(50):
            loss = F.cross_entropy(model(images[ids]), labels[ids])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(images[1500:]).argmax(1) == labels[1500:]
    return 100 * right.float().mean().item()


def properties(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for random and for trained weights; none for attention without token weights."""
    torch.manual_seed(0)
    sizes = {**SMALL, "num_heads": HEADS.get(name, SMALL["num_heads"])}
    model = Deit(num_classes=10, attention=name, **sizes).eval()
    images, labels = digits()
    if not hasattr(model.blocks[0].attn.core, "weights"):
        return []
    rows = [{"attention": name, "weights": "random", **observe(model, images[-options.images :])}]
    if options.epochs:
        accuracy = train(model, images, labels, options.epochs)
        found = observe(model, images[-options.images :])
        rows.append({"attention": name, "weights": "trained", "accuracy": accuracy, **found})
    return rows


@torch.no_grad()
def observe(model: Deit, images: Tensor) -> dict[str, float]:
    """Entropy and the two shares, averaged over images, blocks, heads and queries."""
    inputs: list[tuple[TokenProjected, Tensor]] = []
    hooks = [
        block.attn.register_forward_hook(lambda module, given, _: inputs.append((module, given[0])))
        for block in model.blocks
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    found: dict[str, list[float]] = {"entropy": [], "same_when_doubled": [], "same_pairs": []}
    for attention, x in inputs:
        q, k, _ = attention.project(x, attention.grid)
        rows, doubled = attention.core.weights(q, k), attention.core.weights(2 * q, k)
        found["entropy"].append(entropy(rows))
        found["same_when_doubled"].append((distance(rows, doubled) < SAME).float().mean().item())
        found["same_pairs"].append(same_pairs(q, rows))
    return {key: statistics.fmean(values) for key, values in found.items()}


def entropy(rows: Tensor) -> float:
    """Mean entropy of the rows (..., n) over log n: 1 is uniform, 0 a single token."""
    share = rows.abs() / rows.abs().sum(-1, keepdim=True).clamp(min=1e-30)
    bits = -(share * share.clamp(min=1e-30).log()).sum(-1)
    return (bits / torch.tensor(float(rows.shape[-1])).log()).mean().item()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖ over the larger length, along the last dimension; 0 for two rows of zeros."""
    longest = torch.maximum(a.norm(dim=-1), b.norm(dim=-1))
    return (a - b).norm(dim=-1) / longest.clamp(min=1e-30)


def same_pairs(q: Tensor, rows: Tensor) -> float:
    """Share of pairs of queries that differ by more than 10 SAME and yet have the same row."""
    heads, n = rows.shape[1], rows.shape[2]
    queries = q.unflatten(2, (heads, -1)).transpose(1, 2)
    shifts = range(1, n, max(n // 16, 1))
    different = same = 0
    for shift in shifts:
        apart = distance(queries, queries.roll(shift, 2)) > 10 * SAME
        equal = distance(rows, rows.roll(shift, 2)) < SAME
        different += int(apart.sum())
        same += int((apart & equal).sum())
    return same / max(different, 1)


# ---------------------------------------------------------------- table and picture


def tables(found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [f"Measured on: {found['machine']}; batch {found['batch']}.", ""]
    for mode in dict.fromkeys(row["mode"] for row in found["cost"]):
        rows = [row for row in found["cost"] if row["mode"] == mode]
        sizes = sorted({row["tokens"] for row in rows})
        lines += [f"| {mode}: ms / MiB | " + " | ".join(f"{n:,} tokens" for n in sizes) + " |"]
        lines += ["| --- |" + " ---: |" * len(sizes)]
        for name in dict.fromkeys(row["attention"] for row in rows):
            cells = {row["tokens"]: _cell(row) for row in rows if row["attention"] == name}
            lines.append(f"| {name} | " + " | ".join(cells.get(n, "") for n in sizes) + " |")
        lines.append("")
    if found.get("properties"):
        lines += [
            "| attention | weights | digits top-1 | entropy / log n | same, doubled | same pairs |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for row in found["properties"]:
            accuracy = f"{row['accuracy']:.1f}%" if "accuracy" in row else "-"
            lines.append(
                f"| {row['attention']} | {row['weights']} | {accuracy} | {row['entropy']:.3f}"
                f" | {row['same_when_doubled']:.1%} | {row['same_pairs']:.1%} |"
            )
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    if "failed" in row:
        return row["failed"]
    return f"{1e3 * row['seconds']:,.0f} / {row['bytes'] / 2**20:,.0f}"


def picture(found: dict[str, Any], path: Path) -> None:
    """Time and memory against tokens, both axes logarithmic; one panel for each mode."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row["mode"] for row in found["cost"]))
    figure = Figure(figsize=(6 * len(modes), 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(modes), squeeze=False)
    scales = (("seconds", 1.0, "seconds"), ("bytes", 2**20, "MiB added at the peak"))
    for column, mode in enumerate(modes):
        for line, (key, unit, label) in enumerate(scales):
            axes = panels[line][column]
            for name in dict.fromkeys(row["attention"] for row in found["cost"]):
                rows = [
                    row
                    for row in found["cost"]
                    if row["attention"] == name and row["mode"] == mode and key in row
                ]
                values = [row[key] / unit for row in rows]
                axes.plot([row["tokens"] for row in rows], values, marker="o", label=name)
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, title=mode)
            axes.grid(alpha=0.3)
    panels[0][0].legend()
    figure.suptitle(f"DeiT-Tiny with other attentions, batch {found['batch']}, {found['machine']}")
    temporary = path.with_name(path.name + files.TEMPORARY_SUFFIX)
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
