"""One rank, whoever started it: settle the environment, then run the program's ``main``."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from l2vit import cli
from l2vit.launch import processes

PREFLIGHT = "--preflight"
ORPHAN_GRACE = 120.0
"""Seconds a rank without its launcher has to save and leave."""


def run(module: str, argv: Sequence[str]) -> int:
    """Run ``module.main(argv)`` as one rank and return its exit status.

    Args:
        module: ``pretrain.train`` or ``finetune.train``.
        argv: the program's arguments; DeepSpeed's ``--local_rank`` is taken out.
    """
    settle_environment()
    watch_launcher()
    arguments = without_local_rank(argv)
    if PREFLIGHT in arguments:
        arguments.remove(PREFLIGHT)
        module = "l2vit.launch.cluster_check"
    program = importlib.import_module(module)
    return cli.run(lambda: program.main(arguments), program=module, report=cli.is_rank_0())


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """The arguments without ``--local_rank=N``, which DeepSpeed adds and the environment holds."""
    kept = []
    for argument in argv:
        name, _, value = argument.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value)
        else:
            kept.append(argument)
    return kept


def settle_environment() -> None:
    """Set what must be set before torch and DeepSpeed are imported, unless the user has."""
    import torch  # after OMP_NUM_THREADS from the supervisor; under torchrun it is set already

    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        threads = omp_threads(local_ranks)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def omp_threads(local_ranks: int) -> int:
    """CPU threads of a rank: its share of the cores, at most 8 (the loaders need some, too)."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // max(1, local_ranks)))


def watch_launcher() -> None:
    """Stop as if by SIGTERM when the launcher dies: SIGTERM to ``deepspeed`` kills it alone.

    Watched are the parent and, under DeepSpeed, its parent too (``launch.py`` outlives the
    ``deepspeed`` command that started it). Nobody further up: a shell may rightly be closed.
    """
    chain = [os.getpid(), os.getppid()]
    if _runs_deepspeed(chain[-1]) and (above := processes.find(chain[-1])) is not None:
        chain.append(above.parent)
        if "L2VIT_SUPERVISOR" in os.environ and (top := processes.find(above.parent)) is not None:
            chain.append(top.parent)
    threading.Thread(target=_watch, args=(chain,), name="launcher-watch", daemon=True).start()


def _runs_deepspeed(pid: int) -> bool:
    try:
        return b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _watch(chain: Sequence[int]) -> None:
    while _intact(chain):
        time.sleep(1.0)
    cli.tell(f"rank process {os.getpid()}: its launcher is gone; stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _intact(chain: Sequence[int]) -> bool:
    for child, parent in itertools.pairwise(chain):
        process = processes.find(child)
        if process is None or process.parent != parent:
            return False
    return True
