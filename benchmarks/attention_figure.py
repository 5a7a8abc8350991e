"""Table and picture of what attentions.py measured."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from l2vit import files

# Okabe and Ito's colours, which the colour-blind tell apart, and a marker each for print.
STYLES = {
    "softmax": ("#000000", "s"),
    "xca": ("#999999", "x"),
    "cosformer": ("#CC79A7", "v"),
    "efficient": ("#56B4E9", "<"),
    "sima": ("#F0E442", "P"),
    "linear": ("#0072B2", "o"),
    "enhanced": ("#D55E00", "D"),
    "focused": ("#009E73", "^"),
    "injective": ("#E69F00", ">"),
    "leaky": ("#7570B3", "*"),
}
UNITS = {"seconds": 1.0, "bytes": 2**20}
GAP = 0.075  # between labels, in heights of a panel


def tables(found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [f"Measured on {machine(found)}.", ""]
    for mode in dict.fromkeys(row["mode"] for row in found["cost"]):
        rows = [row for row in found["cost"] if row["mode"] == mode]
        sizes = sorted({row["tokens"] for row in rows})
        lines += [f"| {mode}: ms / MiB | " + " | ".join(f"{n:,} tokens" for n in sizes) + " |"]
        lines += ["| --- |" + " ---: |" * len(sizes)]
        for name in dict.fromkeys(row["attention"] for row in rows):
            cells = {row["tokens"]: cell(row) for row in rows if row["attention"] == name}
            lines.append(f"| {name} | " + " | ".join(cells.get(n, "") for n in sizes) + " |")
        lines.append("")
    if found["properties"]:
        lines += [
            "| random → trained | digits top-1 | entropy / log n | same doubled | same pairs |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
    for row in found["properties"]:
        before, after = row["random"], row["trained"]
        shares = [
            f"{before[key]:{form}} → {after[key]:{form}}"
            for key, form in (
                ("entropy", ".3f"),
                ("same_when_doubled", ".1%"),
                ("same_pairs", ".2%"),
            )
        ]
        lines.append(f"| {row['attention']} | {row['accuracy']:.1f}% | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def machine(found: dict[str, Any]) -> str:
    """The conditions in words."""
    given = found["settings"]
    threads = f", {given['threads']} thread{'s' * (given['threads'] > 1)}" * bool(given["threads"])
    note = f" ({given['note']})" * bool(given["note"])
    return f"{given['machine']}{threads}{note}, batch {given['batch']}, torch {given['torch']}"


def cell(row: dict[str, Any]) -> str:
    """Milliseconds and MiB of a row, or why there are none."""
    if "skipped" in row:
        return str(row["skipped"])
    seconds, size = (statistics.median(row[key]) for key in UNITS)
    return f"{1e3 * seconds:,.0f} / {size / 2**20:,.0f}"


def picture(found: dict[str, Any], path: Path) -> None:
    """Time and memory against tokens, both axes logarithmic; one column for each mode. Without
    any such measurement there is no picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row["mode"] for row in found["cost"]))
    if not modes:
        return
    figure = Figure(figsize=(5.2 * len(modes), 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(modes), squeeze=False)
    clock = "CPU time" if found["settings"]["device"] == "cpu" else "time"
    for column, mode in enumerate(modes):
        rows = [row for row in found["cost"] if row["mode"] == mode]
        panel(panels[0][column], rows, "seconds", f"{clock} of a {mode} pass (s)")
        panel(panels[1][column], rows, "bytes", f"memory added by a {mode} pass (MiB)")
    figure.suptitle(f"DeiT-Tiny with each attention\n{machine(found)}", fontsize=9)
    with files.atomic_writer(path) as stream:
        figure.savefig(stream, format="png", dpi=150)


def panel(axes: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    """A line for each attention, named at its right end."""
    ends: dict[str, tuple[float, float]] = {}
    sizes = sorted({row["tokens"] for row in rows})
    for name in dict.fromkeys(row["attention"] for row in rows):
        points = sorted(
            (row["tokens"], statistics.median(row[key]) / UNITS[key])
            for row in rows
            if row["attention"] == name and key in row
        )
        if not points:
            continue
        color, marker = STYLES[name]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, lw=1.3)
        ends[name] = points[-1]
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlim(sizes[0] * 0.85, sizes[-1] * 3.4)  # room for the names
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = (math.log(limit) for limit in axes.get_ylim())
    heights = {name: (math.log(end[1]) - low) / (high - low) for name, end in ends.items()}
    for name, height in spread(heights).items():
        axes.annotate(
            name,
            xy=ends[name],
            xytext=(0.80, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": STYLES[name][0], "lw": 0.8, "shrinkB": 4},
        )


def spread(heights: dict[str, float]) -> dict[str, float]:
    """Heights in [0, 1] moved apart to GAP, as little as that takes and in the same order.

    Names too near form a block around the mean of their heights (pooled adjacent violators)."""
    names = sorted(heights, key=heights.__getitem__)
    blocks: list[list[float]] = []  # wanted bottom, number of names
    for index, name in enumerate(names):
        blocks.append([heights[name] - index * GAP, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            bottom, count = blocks.pop()
            below = blocks[-1]
            below[0] = (below[0] * below[1] + bottom * count) / (below[1] + count)
            below[1] += count
    top = 1.0 - (len(names) - 1) * GAP
    offsets = [min(max(bottom, 0.0), top) for bottom, count in blocks for _ in range(int(count))]
    return {n: offsets[index] + index * GAP for index, n in enumerate(names)}
