"""A copy of a run's checkpoints at an address (``s3://…``), to continue from when disks are lost.

Rank 0 copies complete checkpoints in the background, the one that makes them complete last. A copy
that fails is told and tried again with the next checkpoint; training goes on.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l2vit import cli
from l2vit.errors import ConfigError, UserError
from l2vit.train import checkpoint

_STEP = re.compile(r"step-(\d{8})$")


class Mirror:
    """The checkpoints at ``address``.

    Args:
        address: of a directory, as fsspec names it.
        keep_last: newest checkpoints kept there.
        keep_every: checkpoints at multiples of so many steps are kept for good; 0 for none.

    Raises:
        ConfigError: nothing installed reads such an address.
    """

    def __init__(self, address: str, *, keep_last: int = 2, keep_every: int = 0) -> None:
        import fsspec

        self.address = address.rstrip("/")
        self._keep_last, self._keep_every = keep_last, keep_every
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.mirror: cannot open {address}: {error}") from None
        self._waiting: Path | None = None
        self._changed = threading.Lock()
        self._thread: threading.Thread | None = None

    def copy(self, directory: Path) -> None:
        """Copy a complete checkpoint in the background; a newer one overtakes one that waits."""
        with self._changed:
            self._waiting = directory
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Wait for the copy under way."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def fetch_newest(self, run: Path) -> int | None:
        """Copy the newest complete checkpoint into the run directory; its step, None if none.

        Raises:
            UserError: it cannot be read.
        """
        try:
            steps = self._steps()
            if not steps:
                return None
            self._fetch(steps[-1], checkpoint.step_directory(run, steps[-1]))
        except Exception as error:
            raise UserError(f"checkpoint.mirror: cannot read {self.address}: {error}") from None
        return steps[-1]

    def _work(self) -> None:
        while True:
            with self._changed:
                directory, self._waiting = self._waiting, None
                if directory is None:
                    self._thread = None
                    return
            self._tell_failure(directory, self._copy)

    def _tell_failure(self, directory: Path, action: Callable[[Path], None]) -> None:
        try:
            action(directory)
        except Exception as error:
            cli.tell(
                f"warning: {directory.name} was not copied to {self.address}:"
                f" {type(error).__name__}: {error}",
                error=True,
            )

    def _copy(self, directory: Path) -> None:
        target = f"{self._root}/{directory.name}"
        names = sorted(p.name for p in directory.iterdir() if p.name != checkpoint.META_NAME)
        self._files.makedirs(target, exist_ok=True)
        for name in (*names, checkpoint.META_NAME):
            self._files.put_file(str(directory / name), f"{target}/{name}")
        self._prune()

    def _prune(self) -> None:
        for step in self._steps()[: -self._keep_last]:
            if not (self._keep_every and step % self._keep_every == 0):
                stale = f"{self._root}/step-{step:08d}"
                self._files.rm_file(f"{stale}/{checkpoint.META_NAME}")
                self._files.rm(stale, recursive=True)

    def _steps(self) -> list[int]:
        """Steps of the complete checkpoints there, ascending."""
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return []
        found: list[Any] = self._files.ls(self._root, detail=False)
        steps = [int(match[1]) for path in found if (match := _STEP.search(str(path).rstrip("/")))]
        name = checkpoint.META_NAME
        return sorted(s for s in steps if self._files.exists(f"{self._root}/step-{s:08d}/{name}"))

    def _fetch(self, step: int, directory: Path) -> None:
        """Copy one checkpoint here, its marker last: a kill leaves none that looks whole."""
        source = f"{self._root}/step-{step:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        names = [str(p).rstrip("/").rsplit("/", 1)[1] for p in self._files.ls(source, detail=False)]
        marker = checkpoint.META_NAME
        for name in (*sorted(n for n in names if n != marker), marker):
            part = directory / f"{name}.part"
            self._files.get_file(f"{source}/{name}", str(part))
            part.rename(directory / name)
