"""The launcher's flags, checked before any rank is started, and the command that starts them."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from l2vit import cli, config
from l2vit.errors import ConfigError
from l2vit.launch.rank import omp_threads
from l2vit.train import checks, tasks
from l2vit.train.config import TrainConfig

CPU_RANKS = 2
_TO_DEEPSPEED = (
    "hostfile",
    "node_rank",
    "master_addr",
    "master_port",
    "num_nodes",
    "include",
    "exclude",
    "launcher",
    "launcher_args",
    "ssh_port",
)


@dataclass(frozen=True)
class Launch:
    """What to start."""

    argv: list[str]
    environment: dict[str, str]
    config: TrainConfig
    remote: bool
    """Ranks are started on other hosts through ssh."""


def _parser(program: str) -> argparse.ArgumentParser:
    parser = cli.parser(
        f"bash {program}",
        "Start the ranks on this node (or on a hostfile's nodes) and watch them.",
        epilog="Everything else goes to the program: --config FILE and key.sub=value overrides.\n"
        "Exit status: 0 done, 1 failed, 2 wrong configuration, 75 stopped by a signal after\n"
        "saving (the same command continues).",
        keys_of=TrainConfig,
    )
    add = parser.add_argument
    nproc = os.environ.get("L2VIT_NPROC") or None
    add("--nproc", default=nproc, help="ranks on each node; default: its GPUs, or 2 on CPU")
    add("--max-restarts", type=int, default=0, help="restarts after a failure (default 0)")
    add("--backoff", type=float, default=10.0, help="seconds before the first restart, doubling")
    add("--stop-grace", type=float, default=300.0, help="seconds to save after a signal")
    add("--preflight", action="store_true", help="check the cluster with these ranks; no training")
    group = parser.add_argument_group("several nodes", "given to deepspeed as they are")
    for name in _TO_DEEPSPEED:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        group.add_argument(*spellings, dest=name, metavar="X")
    group.add_argument(
        "--no_ssh", "--no-ssh", action="store_true", help="each node runs this command itself"
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Split ``SCRIPT ARGS`` into the launcher's options and the program's (``.rest``)."""
    script, *arguments = argv
    options, rest = _parser(script).parse_known_args(arguments)
    options.script, options.rest = script, rest
    if options.max_restarts < 0:
        raise ConfigError(f"--max-restarts: {options.max_restarts} must not be negative")
    if options.nproc is not None:
        if not options.nproc.isdigit() or int(options.nproc) < 1:
            raise ConfigError(f"--nproc: {options.nproc!r} is not a number of ranks")
        options.nproc = int(options.nproc)
    if options.no_ssh and not (options.hostfile and options.node_rank and options.master_addr):
        raise ConfigError("--no_ssh needs --hostfile, --node_rank and --master_addr, too")
    return options


def read_config(rest: Sequence[str]) -> TrainConfig:
    """The program's configuration, read here so that a wrong one costs no launch.

    Raises:
        ConfigError: no ``--config``, or anything the program itself would refuse.
    """
    return tasks.load_config(*config_arguments(rest))


def config_arguments(rest: Sequence[str]) -> tuple[str, list[str]]:
    """The file and the overrides among the program's arguments.

    Raises:
        ConfigError: no ``--config``.
    """
    path, overrides = None, []
    arguments = iter(rest)
    for argument in arguments:
        if argument == "--config":
            path = next(arguments, None)
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        elif not argument.startswith("-"):
            overrides.append(argument)
    if path is None:
        raise ConfigError("--config FILE is required (pretrain/configs or finetune/configs)")
    return path, overrides


def check(script: str, rest: Sequence[str]) -> None:
    """Refuse a run that cannot work before anything is started for it.

    Raises:
        UserError: of :func:`l2vit.train.checks.check`, with the file or override at fault.
    """
    path, overrides = config_arguments(rest)
    settings = tasks.load_config(path, overrides)
    try:
        if Path(script).stem == "finetune":
            checks.require_first_weights(settings)
        checks.check(settings)
    except ConfigError as error:
        raise config.blamed(error, path, overrides) if error.key else error from None


def build(options: argparse.Namespace) -> Launch:
    """Check the configuration and this node's devices; compose the ``deepspeed`` command."""
    settings = read_config(options.rest)
    remote = options.hostfile is not None and not options.no_ssh
    environment = _environment()
    local_ranks, flags = _devices(options, environment)
    environment.setdefault("OMP_NUM_THREADS", str(omp_threads(local_ranks)))
    for name in _TO_DEEPSPEED:
        if getattr(options, name) is not None:
            flags += [f"--{name}", getattr(options, name)]
    if options.no_ssh:
        flags.append("--no_ssh")
    elif not remote and options.master_port is None:
        # Two runs on one machine must not meet on DeepSpeed's fixed default port.
        flags += ["--master_port", str(free_port())]
    argv = [sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    argv += [*flags, options.script, *(["--preflight"] if options.preflight else []), *options.rest]
    return Launch(argv, environment, settings, remote)


def _environment() -> dict[str, str]:
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    environment["L2VIT_SUPERVISOR"] = str(os.getpid())
    return environment


def _devices(options: argparse.Namespace, environment: dict[str, str]) -> tuple[int, list[str]]:
    """Ranks on this node and the flags that make DeepSpeed start so many; settles the rest."""
    import torch

    gpus = 0 if environment.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if gpus == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        ranks = options.nproc or CPU_RANKS
        return ranks, [] if options.hostfile else ["--num_gpus", str(ranks)]
    if options.nproc is not None and options.nproc > gpus:
        raise ConfigError(f"--nproc: {options.nproc} ranks, but this node shows {gpus} GPU(s)")
    ranks = options.nproc or gpus
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible and not options.hostfile:
        # DeepSpeed ignores the variable when a number is given: shorten it instead.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:ranks])
        return ranks, []
    return ranks, ["--num_gpus", str(ranks)] if options.nproc or not options.hostfile else []


def free_port() -> int:
    """A TCP port nobody listens on, below those that Linux gives to outgoing connections.

    The ranks listen on it seconds later: no connection made meanwhile must have taken it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
