"""A torch.profiler window over chosen steps, viewable in TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch.profiler as torch_profiler

from l2vit.errors import ConfigError
from l2vit.train.distributed import World

FOLDER = "profile"


@contextlib.contextmanager
def profiler(steps: Sequence[int], run: Path, world: World) -> Iterator[Callable[[int], None]]:
    """Trace steps ``steps[0]`` … ``steps[1]`` of rank 0 into ``profile/`` of the run directory.

    Args:
        steps: first and last step, counted from 1; empty for no trace.
        run: the run directory.
        world: only rank 0 traces.

    Yields:
        What to call after each step with the number of steps done.

    Raises:
        ConfigError: not two increasing steps.
    """
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise ConfigError(f"log.profile_steps: {list(steps)} is not [first, last] with 1 ≤ first")
    if not steps or not world.main:
        yield lambda step: None
        return
    window: torch_profiler.profile | None = None

    def stop() -> None:
        nonlocal window
        if window is not None:
            window.stop()
            window = None

    def after(step: int) -> None:
        nonlocal window
        if step == steps[1]:
            stop()
        elif step == steps[0] - 1:
            window = start(run)

    if steps[0] == 1:
        window = start(run)
    try:
        yield after
    finally:
        stop()


def start(run: Path) -> torch_profiler.profile:
    """A started profiler that writes its trace when it stops."""
    window = torch_profiler.profile(
        on_trace_ready=torch_profiler.tensorboard_trace_handler(str(run / FOLDER)),
        record_shapes=True,
    )
    window.start()
    return window
