"""One rank, whoever started it: settle the environment, then run the program's ``main``."""

from __future__ import annotations

import faulthandler
import importlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from l2vit import cli
from l2vit.launch import processes

PREFLIGHT = "--preflight"
START_SECONDS = "L2VIT_START_SECONDS"
"""Seconds a rank has to begin its first step; 0: any number."""
UNREACHABLE = 69
"""As ``rendezvous.UnreachablePeers``, which cannot be imported where an import may hang."""
ORPHAN_GRACE = 120.0
"""Seconds a rank without its launcher has to save and leave."""


def run(module: str, argv: Sequence[str]) -> int:
    """Run ``module.main(argv)`` as one rank and return its exit status.

    Args:
        module: ``pretrain.train`` or ``finetune.train``.
        argv: the program's arguments; DeepSpeed's ``--local_rank`` is taken out.
    """
    watch_start()
    settle_environment()
    watch_launcher()
    arguments = without_local_rank(argv)
    if PREFLIGHT in arguments:
        arguments.remove(PREFLIGHT)
        module = "l2vit.launch.cluster_check"
    program = importlib.import_module(module)
    return cli.run(
        lambda: _without_lost_peers(program.main, arguments),
        program=module,
        report=cli.is_rank_0(),
    )


def _without_lost_peers(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run ``main``; another rank that is gone before training began is an error of one line."""
    from l2vit.train import distributed, rendezvous

    try:
        return main(argv)
    except RuntimeError as error:
        if not distributed.is_lost_peer(error):
            raise
        first = str(error).splitlines()[0]
        rank = os.environ.get("RANK", "0")
        raise rendezvous.UnreachablePeers(
            f"rank {rank} lost another rank while starting ({first})"
        ) from error


def watch_start() -> None:
    """End this rank if its first step has not begun after ``L2VIT_START_SECONDS`` (1800)."""
    limit = float(os.environ.get(START_SECONDS, 1800.0))
    if limit > 0:
        threading.Thread(target=_await_start, args=(limit,), name="start", daemon=True).start()


def _await_start(limit: float) -> None:
    """Count the seconds in which this process really ran; say where it stands when they are over.

    A rank that waits for others goes a little later and with another status: it is not the cause.
    """
    lived, before = 0.0, time.monotonic()
    while lived < limit:
        time.sleep(0.5)
        if _training_began():
            return
        now = time.monotonic()
        lived, before = lived + min(now - before, 2.0), now
    rank, waiting = os.environ.get("RANK", "0"), _waits_for_others()
    if waiting:
        time.sleep(10.0)
    doing = "waits for other ranks" if waiting else "stands where the lines below say"
    cli.tell(
        f"error: rank {rank} on {socket.gethostname()} has not begun its first step after"
        f" {limit:g} s (--start-timeout): it {doing}",
        error=True,
    )
    if not waiting:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    os._exit(UNREACHABLE if waiting else 1)


def _training_began() -> bool:
    module = sys.modules.get("l2vit.train.throughput")
    began = getattr(module, "training_began", None)  # the main thread may be importing it just now
    return began is not None and began.is_set()


def _waits_for_others() -> bool:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith(("distributed_c10d.py", "rendezvous.py")):
            return True
        frame = frame.f_back
    return False


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
