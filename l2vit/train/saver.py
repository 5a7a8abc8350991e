"""Saving without stopping: copy to host memory, write in the background, commit together.

Every rank writes its own part in a thread of its own. No thread takes part in a collective: at
each step the ranks exchange a few numbers anyway (``poll``), and when all have written, rank 0
commits the checkpoint. A save that fails, for example because the disk is full, is reported and
counted; training goes on until too many failed in a row.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from l2vit import cli
from l2vit.errors import UserError
from l2vit.train import checkpoint
from l2vit.train.checkpoint import CheckpointMeta, Part, TensorSlice
from l2vit.train.config import CheckpointConfig
from l2vit.train.distributed import World
from l2vit.train.engine import Engine
from l2vit.train.mirror import Mirror


@dataclass
class _Save:
    """One save under way on this rank."""

    directory: Path
    meta: CheckpointMeta
    best: bool
    started: float
    part: Part | None = None
    problem: str = ""
    stalled: float = 0.0
    thread: threading.Thread | None = field(default=None, repr=False)

    @property
    def over(self) -> bool:
        return self.part is not None or bool(self.problem)


class Saver:
    """Writes the checkpoints of a run and keeps the right ones."""

    def __init__(
        self, run: Path, config: CheckpointConfig, *, world: World, keep_every: int
    ) -> None:
        self.run, self.config, self.world, self.keep_every = run, config, world, keep_every
        self.failures = 0
        self.seconds = 0.0
        """How long the last save took from copy to commit."""
        self.stalled_seconds = 0.0
        """How long the last save kept training waiting."""
        self._save: _Save | None = None
        self._mirror: Mirror | None = None
        if config.mirror and world.main:
            kept = {"keep_last": config.keep_last, "keep_every": keep_every}
            self._mirror = Mirror(config.mirror, **kept)

    def start(self, engine: Engine, meta: CheckpointMeta, *, best: bool = False) -> None:
        """Begin saving the engine's state; waits for an earlier save that is not done.

        Args:
            engine: its tensors are copied before this returns.
            meta: goes into the index.
            best: link this checkpoint as the best so far.
        """
        began = time.monotonic()
        self.finish()
        engine.average_buffers()
        pieces = self._copy(engine)
        directory = checkpoint.step_directory(self.run, meta.step)
        save = _Save(directory, meta, best, began)
        self._save = save
        save.thread = threading.Thread(target=self._write, args=(save, pieces), name="checkpoint")
        save.thread.start()
        if not self.config.background:
            self.finish()
        save.stalled = time.monotonic() - began

    @property
    def written(self) -> bool:
        """True if this rank has written its part of the save under way."""
        return self._save is not None and self._save.over

    def poll(self, ranks_written: int) -> None:
        """Commit the save under way if all ranks have written; every rank calls it alike.

        Args:
            ranks_written: how many ranks' ``written`` is true.

        Raises:
            UserError: too many saves failed in a row.
        """
        if self._save is not None and ranks_written == self.world.size:
            self._commit(self._save)
            self._save = None

    def finish(self) -> None:
        """Wait for the save under way and commit it; every rank calls it alike."""
        if self._save is None:
            return
        if self._save.thread is not None:
            self._save.thread.join()
        self.poll(round(self.world.sum([self.written])[0]))

    def close(self) -> None:
        """Wait for the copy to ``checkpoint.mirror`` that is under way."""
        if self._mirror is not None:
            self._mirror.finish()

    def _copy(self, engine: Engine) -> list[tuple[TensorSlice, torch.Tensor]]:
        """This rank's tensors on the host; rank 0 takes the buffers, equal on all ranks."""
        copies = []
        flats: dict[int, torch.Tensor] = {}  # shards lie in a few flat tensors: one copy of each
        for key, shard, view in engine.tensors():
            piece = TensorSlice(key, shard.shape, shard.start, shard.numel)
            at = view.untyped_storage().data_ptr()
            if at not in flats:
                flats[at] = _to_host(_whole(view))
            copies.append((piece, flats[at].narrow(0, view.storage_offset(), view.numel())))
        if self.world.main:
            for key, buffer in engine.buffers().items():
                piece = TensorSlice(key, tuple(buffer.shape), 0, buffer.numel())
                copies.append((piece, _to_host(buffer)))
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return copies

    def _write(self, save: _Save, pieces: list[tuple[TensorSlice, torch.Tensor]]) -> None:
        name = checkpoint.part_name(self.world.rank, self.world.size)
        try:
            save.directory.mkdir(parents=True, exist_ok=True)
            save.part = checkpoint.write_part(save.directory / name, pieces)
        except Exception as error:  # otherwise the thread dies and the failure goes unreported
            kind = "" if isinstance(error, OSError | UserError) else f"{type(error).__name__}: "
            save.problem = f"rank {self.world.rank}: {kind}{error}"

    def _commit(self, save: _Save) -> None:
        problem = ""
        gathered: list[tuple[Part | None, str]] = self.world.gather((save.part, save.problem))
        problems = [text for _, text in gathered if text]
        if problems:
            problem = problems[0]
        elif self.world.main:
            try:
                parts = [part for part, _ in gathered if part is not None]
                checkpoint.commit(save.directory, save.meta, parts)
                if save.best:
                    checkpoint.link_best(save.directory)
                if self._mirror is not None:
                    self._mirror.copy(save.directory)
                checkpoint.prune(
                    self.run, keep_last=self.config.keep_last, keep_every=self.keep_every
                )
            except (OSError, UserError) as error:
                problem = str(error)
        problem = self.world.broadcast(problem)
        self.seconds = time.monotonic() - save.started
        self.stalled_seconds = save.stalled
        self._settle(save, problem)

    def _settle(self, save: _Save, problem: str) -> None:
        if not problem:
            self.failures = 0
            return
        self.failures += 1
        if self.world.main:
            with contextlib.suppress(OSError):
                checkpoint.remove(save.directory)
            limit = self.config.max_failures
            cli.tell(
                f"warning: checkpoint of step {save.meta.step} not saved"
                f" ({self.failures} of {limit} failures in a row): {problem}",
                error=True,
            )
        if self.failures >= self.config.max_failures:
            free = shutil.disk_usage(self.run).free
            raise UserError(
                f"{self.failures} checkpoints in a row could not be saved ({problem};"
                f" {free:,} bytes free in {self.run}); make room and run it again, or raise"
                " checkpoint.max_failures"
            )


def _whole(view: torch.Tensor) -> torch.Tensor:
    """Everything in the storage of ``view``, as one flat tensor."""
    numel = view.untyped_storage().nbytes() // view.element_size()
    return view.detach().as_strided((numel,), (1,), 0)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor.detach().clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)
