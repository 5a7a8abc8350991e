"""Table and picture of what attentions.py measured."""

from __future__ import annotations

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
    """Time and memory against tokens, both axes logarithmic; one column for each mode."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row["mode"] for row in found["cost"]))
    if not modes:
        return
    figure = Figure(figsize=(4.6 * len(modes), 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(modes), squeeze=False)
    clock = "CPU time" if found["settings"]["device"] == "cpu" else "time"
    for column, mode in enumerate(modes):
        rows = [row for row in found["cost"] if row["mode"] == mode]
        panel(panels[0][column], rows, "seconds", f"{clock} of a {mode} pass (s)")
        panel(panels[1][column], rows, "bytes", f"memory added by a {mode} pass (MiB)")
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(f"DeiT-Tiny with each attention\n{machine(found)}", fontsize=9)
    with files.atomic_writer(path) as stream:
        figure.savefig(stream, format="png", dpi=150)


def panel(axes: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    """A line for each attention. Memory below 1 MiB is lost in what was free before: drawn as 1."""
    sizes = sorted({row["tokens"] for row in rows})
    least = 1.0 if key == "bytes" else 0.0
    for name in dict.fromkeys(row["attention"] for row in rows):
        points = [
            (row["tokens"], max(statistics.median(row[key]) / UNITS[key], least))
            for row in rows
            if row["attention"] == name and key in row
        ]
        points.sort()
        color, marker = STYLES[name]
        x, y = [point[0] for point in points], [point[1] for point in points]
        axes.plot(x, y, color=color, marker=marker, markersize=5, lw=1.3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.set_xticks([], minor=True)
    if any(row.get("bytes") and statistics.median(row["bytes"]) < 2**20 for row in rows) and least:
        axes.text(0.99, 0.02, "at 1: up to 1 MiB", transform=axes.transAxes, ha="right", fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
