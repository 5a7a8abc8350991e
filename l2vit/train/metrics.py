"""The one door for everything a run measures: metrics.jsonl, TensorBoard and the console."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from l2vit import files

JSONL = "metrics.jsonl"
_CONSOLE = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "|g| {:.2f}",
    "images_per_second": "{:,.0f} img/s",
    "mfu_percent": "MFU {:.1f}%",
    "data_wait_percent": "data wait {:.0f}%",
    "seconds_left": "{} left",
}


class Metrics:
    """Writes records of a run; on ranks other than 0 every method does nothing.

    Keys carry their unit (``images_per_second``, ``val/top1_percent``); a key without one is a
    plain number. Curves have no double entries: what an interrupted run wrote after the
    checkpoint it continues from is taken out again.
    """

    def __init__(self, run: Path, *, main: bool, total_steps: int, resumed_step: int = 0) -> None:
        self.path = run / JSONL
        self._main, self._total = main, total_steps
        self._stream: TextIO | None = None
        self._board: Any = None
        self._live = False
        self._pictured = False
        if not main:
            return
        truncate(self.path, resumed_step)
        self._stream = self.path.open("a")
        from torch.utils.tensorboard import SummaryWriter  # heavy: rank 0 alone needs it

        self._board = SummaryWriter(str(run), purge_step=resumed_step + 1 if resumed_step else None)

    def log(self, step: int, values: Mapping[str, float], *, images_seen: int) -> None:
        """Write one record: scalars measured at the end of ``step`` optimizer steps."""
        if self._stream is None:
            return
        record = {"step": step, "images": images_seen, "time": round(time.time(), 3), **values}
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
        for key, value in values.items():
            self._board.add_scalar(key if "/" in key else f"train/{key}", value, step)
        if "loss" in values:
            self._show(step, values)

    def histogram(
        self, step: int, key: str, counts: Sequence[float], edges: Sequence[float]
    ) -> None:
        """Write a histogram to TensorBoard: ``counts[i]`` values up to ``edges[i]``."""
        if self._board is None:
            return
        total = float(sum(counts))
        self._board.add_histogram_raw(
            key,
            min=edges[0],
            max=edges[-1],
            num=total,
            sum=sum(c * e for c, e in zip(counts, edges, strict=True)),
            sum_squares=sum(c * e * e for c, e in zip(counts, edges, strict=True)),
            bucket_limits=list(edges),
            bucket_counts=list(counts),
            global_step=step,
        )

    def first_pictures(self, step: int, make: Callable[[], Any]) -> None:
        """Show TensorBoard what the model sees, once: ``make`` gives an (H, W, 3) uint8 picture."""
        if self._board is not None and not self._pictured:
            self._pictured = True
            self._board.add_image("train/pictures", make(), step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        """Take out the records after ``step``: the run goes back to it."""
        if self._stream is not None:
            self._stream.close()
            truncate(self.path, step)
            self._stream = self.path.open("a")

    def say(self, text: str, *, warn: bool = False) -> None:
        """Print lines for people, above the live line."""
        if self._main:
            self._end_live()
            print(f"warning: {text}" if warn else text, file=sys.stderr if warn else sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Flush and close the files."""
        if self._stream is not None:
            self._end_live()
            self._stream.close()
            self._board.close()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        shown = [
            text.format(clock(values[key]) if key == "seconds_left" else values[key])
            for key, text in _CONSOLE.items()
            if key in values
        ]
        line = f"step {step:,}/{self._total:,}  {'  '.join(shown)}"
        if sys.stdout.isatty():
            width = max(20, os.get_terminal_size().columns - 1)
            print(f"\r{line[:width]:<{width}}", end="", flush=True)
            self._live = True
        else:
            print(line, flush=True)

    def _end_live(self) -> None:
        if self._live:
            print(flush=True)
            self._live = False


def clock(seconds: float) -> str:
    """``3 d 04:05:06`` without what is zero in front."""
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a line cut short by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


def truncate(path: Path, step: int) -> None:
    """Leave only records of steps up to ``step``."""
    if path.exists():
        kept = [record for record in read(path) if record["step"] <= step]
        files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
