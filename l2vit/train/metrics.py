"""The one door for everything a run measures: metrics.jsonl, loggers and the console."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from l2vit import cli, files
from l2vit.train import loggers

JSONL = "metrics.jsonl"
_CONSOLE = {
    "loss": "loss {:.4f}",
    "loss_mean": "(mean {:.4f})",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "|g| {:.2f}",
    "images_per_second": "{:,.0f} img/s",
    "mfu_percent": "MFU {:.1f}%",
    "data_wait_percent": "data wait {:.0f}%",
    "seconds_left": "{} left",
}

_MEAN_OVER = 100
"""Steps that the running mean of the loss is taken over."""


class Metrics:
    """Writes records of a run; on ranks other than 0 every method does nothing.

    Keys carry their unit (``images_per_second``, ``val/top1_percent``); a key without one is a
    plain number. Curves have no double entries: what an interrupted run wrote after the
    checkpoint it continues from is taken out again.

    A full disk does not stop training here (whether to stop is the checkpoints' business): records
    wait for room, TensorBoard's curves have a gap.
    """

    def __init__(
        self,
        run: Path,
        *,
        main: bool,
        total_steps: int,
        resumed_step: int = 0,
        sinks: Sequence[str] = (loggers.TENSORBOARD,),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files of a run.

        Args:
            run: its directory.
            main: this is rank 0.
            total_steps: of the whole run.
            resumed_step: records after it are taken out.
            sinks: the loggers beside ``metrics.jsonl``, as in ``log.sinks``.
            settings: the configuration as a tree, shown by the loggers.
        """
        self.path = run / JSONL
        self._main, self._total = main, total_steps
        self._stream: FileIO | None = None
        self._unwritten = b""
        self._warned = False
        self._board: Any = None
        self._loggers: list[loggers.Background] = []
        self._draws = loggers.TENSORBOARD in sinks
        self._live = False
        self._pictured = False
        self._losses: deque[float] = deque(maxlen=_MEAN_OVER)
        self._began = self._shown = time.monotonic()
        if not main:
            return
        truncate(self.path, resumed_step)
        self._stream = FileIO(self.path, "a")
        self._open_board(purge_step=resumed_step + 1 if resumed_step else None)
        if settings is not None:
            self._describe(settings)
            self._loggers = loggers.start(sinks, run, settings)

    def log(self, step: int, values: Mapping[str, float], *, images_seen: int) -> None:
        """Write one record: scalars measured at the end of ``step`` optimizer steps."""
        if self._stream is None:
            return
        record = {"step": step, "images": images_seen, "time": round(time.time(), 3), **values}
        self._unwritten += f"{json.dumps(record)}\n".encode()
        with self._patience():
            self._write()
            if self._board is None:
                self._open_board()
        named = {key if "/" in key else f"train/{key}": value for key, value in values.items()}
        for name, value in named.items():
            self._draw("add_scalar", name, value, step)
        for logger in self._loggers:
            logger.log(step, named)
        if "loss" in values:
            self._show(step, values)

    def note_loss(self, loss: float) -> None:
        """Add a step's loss to the running mean that the console shows."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def progress(self, step: int, loss: float, rates: Callable[[], Mapping[str, float]]) -> None:
        """Show a step that has no record, if the console has been silent for some seconds.

        Args:
            step: its number.
            loss: its loss.
            rates: gives the speed since the last record; asked only if it is shown.
        """
        if self._main and time.monotonic() - self._shown >= self._silence():
            self._show(step, {"loss": loss, **rates()})

    def _silence(self) -> float:
        """Seconds between two lines: a screen is read now, a file that grows for days later."""
        if sys.stdout.isatty():
            return 2.0
        return min(60.0, max(5.0, 0.05 * (time.monotonic() - self._began)))

    def histogram(
        self, step: int, key: str, counts: Sequence[float], edges: Sequence[float]
    ) -> None:
        """Write a histogram to TensorBoard: ``counts[i]`` values up to ``edges[i]``."""
        total = float(sum(counts))
        self._draw(
            "add_histogram_raw",
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
            self._draw("add_image", "train/pictures", make(), step, dataformats="HWC")

    def picture(self, step: int, key: str, pixels: Any) -> None:
        """Show TensorBoard an (H, W, 3) picture of bytes; None shows nothing."""
        if pixels is not None:
            self._draw("add_image", key, pixels, step, dataformats="HWC")

    def sync(self) -> None:
        """Put the records on the disk: a checkpoint must not outlive the records it covers."""
        if self._stream is not None:
            with self._patience():
                self._write()
                os.fsync(self._stream.fileno())

    def rewind(self, step: int) -> None:
        """Take out the records after ``step``: the run goes back to it."""
        if self._stream is not None:
            with self._patience():
                self._write()
            self._stream.close()
            truncate(self.path, step)
            self._losses.clear()
            self._stream, self._unwritten = FileIO(self.path, "a"), b""

    def say(self, text: str, *, warn: bool = False) -> None:
        """Print lines for people, above the live line."""
        if self._main:
            self._end_live()
            cli.tell(f"warning: {text}" if warn else text, error=warn)

    def close(self) -> None:
        """Flush and close the files."""
        if self._stream is not None:
            self._end_live()
            with self._patience():
                self._write()
            self._stream.close()
            self._draw("close")
            for logger in self._loggers:
                logger.close()

    def _write(self) -> None:
        assert self._stream is not None
        while self._unwritten:
            self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]

    def _describe(self, settings: Mapping[str, Any]) -> None:
        """Show TensorBoard the configuration, as text and as hyperparameters of the accuracies."""
        from torch.utils.tensorboard.summary import hparams

        lines = json.dumps(settings, indent=2, default=str).splitlines()
        self._draw("add_text", "configuration", "\n".join(f"    {line}" for line in lines))
        if self._board is not None:
            shown = dict.fromkeys(("train/loss", "val/top1_percent", "val_ema/top1_percent"), 0.0)
            for summary in hparams(loggers.flat(settings), shown):
                with self._patience():
                    self._board.file_writer.add_summary(summary)

    def _open_board(self, **options: Any) -> None:
        if not self._draws:
            return
        from torch.utils.tensorboard import SummaryWriter  # heavy: rank 0 alone needs it

        self._board = SummaryWriter(str(self.path.parent), **options)

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """Tell of the first failure to write within and go on."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                self.say(f"{self.path.parent}: {error.strerror}; records wait for room", warn=True)

    def _draw(self, method: str, *values: Any, **options: Any) -> None:
        """Call TensorBoard's writer; dropped when it fails: its thread has ended with the error."""
        if self._board is None:
            return
        with self._patience():
            board, self._board = self._board, None
            getattr(board, method)(*values, **options)
            self._board = board

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        self._shown = time.monotonic()
        if self._losses:
            values = {**values, "loss_mean": sum(self._losses) / len(self._losses)}
        shown = [
            text.format(clock(values[key]) if key == "seconds_left" else values[key])
            for key, text in _CONSOLE.items()
            if key in values
        ]
        line = f"step {step:,}/{self._total:,}  {'  '.join(shown)}"
        if sys.stdout.isatty():
            width = max(20, os.get_terminal_size().columns - 1)
            cli.tell(f"\r{line[:width]:<{width}}", end="")
            self._live = True
        else:
            cli.tell(line)

    def _end_live(self) -> None:
        if self._live:
            cli.tell("")
            self._live = False


def clock(seconds: float) -> str:
    """``3 d 04:05:06`` without what is zero in front."""
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; lines that a kill or a disk damaged are left out."""
    return [record for record in _parsed(path) if record is not None]


def _parsed(path: Path) -> list[dict[str, Any] | None]:
    """Each line's record, None where there is none in it."""
    if not path.is_file():
        return []
    return [_record(line) for line in path.read_bytes().splitlines()]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    numbers = all(type(value) in (int, float) for value in record.values())
    return record if numbers else None


def truncate(path: Path, step: int) -> None:
    """Leave only records of steps up to ``step``.

    Lines that hold none are dropped; the file as it was is then kept, unless only its last line
    was cut short.
    """
    if not path.exists():
        return
    parsed = _parsed(path)
    if None in parsed[:-1]:
        aside = files.set_aside(path)
        cli.tell(f"warning: {path} has damaged lines; kept as {aside.name}", error=True)
    kept = [record for record in parsed if record is not None and record["step"] <= step]
    files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
