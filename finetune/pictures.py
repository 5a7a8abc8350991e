"""The picture of an evaluation: confusion of the worst classes, and the reliability curve."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.scores import BINS, Scores
from l2vit import files

_ROWS = 12
_COLUMNS = 16
_NAME = 22


def accuracy_picture(scores: Scores, names: Mapping[str, str], path: Path) -> None:
    """Write a PNG: confusion of the worst classes (left), reliability curve (right).

    Args:
        scores: of one evaluation.
        names: readable name of a class identifier, where known.
        path: the PNG to write.
    """
    figure = new_figure(15, 6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _confusion(figure, left, scores, names)
    _reliability(right, scores)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure without a window, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write ``figure`` as PNG, complete or absent."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    files.write_bytes(path, stream.getvalue())


def _confusion(figure: Any, axes: Any, scores: Scores, names: Mapping[str, str]) -> None:
    rows = scores.worst(_ROWS)
    shown, matrix = scores.confusion(rows, _COLUMNS)
    image = axes.imshow(100 * matrix, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    labels = [_label(scores.classes[i], names) for i in shown]
    counts = np.bincount(scores.labels[scores.counted()], minlength=len(scores.classes))
    counted = [f"{label}, {counts[i]:,}" for label, i in zip(labels, shown, strict=True)]
    axes.set_xticks(range(len(shown) + 1), [*labels, "any other"], rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), counted[: len(rows)])
    for (y, x), share in np.ndenumerate(100 * matrix):
        if share >= 0.5:
            colour = "white" if share > 55 else "black"
            axes.text(x, y, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("answer")
    axes.set_ylabel("true class and its images, worst first")
    axes.set_title(f"Answers (%) for the {len(rows)} least accurate classes")
    figure.colorbar(image, ax=axes, label="% of the class's images")


def _label(identifier: str, names: Mapping[str, str]) -> str:
    text = names.get(identifier) or identifier
    return text if len(text) <= _NAME else text[: _NAME - 1] + "…"


def _reliability(axes: Any, scores: Scores) -> None:
    found = scores.reliability()
    centres = (np.arange(BINS) + 0.5) / BINS
    filled = found.counts > 0
    share = found.counts / max(int(found.counts.sum()), 1)
    bars = axes.bar(centres, share, 1 / BINS, color="lightgrey", label="images (share, number)")
    axes.bar_label(bars, [f"{n:,}" if n else "" for n in found.counts], fontsize=7, color="dimgrey")
    axes.plot([0, 1], [0, 1], "--", color="grey", label="perfectly calibrated")
    axes.plot(found.confidence[filled], found.accuracy[filled], "o-", label="accuracy")
    axes.set(xlim=(0, 1), ylim=(0, 1.05), xlabel="confidence", ylabel="accuracy")
    axes.set_title(f"Reliability: calibration error {100 * found.error:.2f}%")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
