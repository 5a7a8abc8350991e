"""The job that the launcher's flags describe: which ranks, where, with what environment."""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from l2vit.errors import ConfigError
from l2vit.launch import hosts, ranks
from l2vit.launch.hosts import Node
from l2vit.launch.rank import START_SECONDS, omp_threads
from l2vit.launch.ranks import Share
from l2vit.train import rendezvous
from l2vit.train.config import TrainConfig

CPU_RANKS = 2
_HANDED_ON = ("NCCL_", "GLOO_", "UCX_", "OMP_", "HF_", "TORCH", "PYTORCH", "L2VIT_", "DS_", "TP_")
"""Variables of this shell that ranks on other nodes get, too."""
_ENVIRONMENT_FILE = ".deepspeed_env"


@dataclass(frozen=True)
class Job:
    """What to start and where."""

    argv: list[str]
    """The command of a rank."""
    environment: dict[str, str]
    nodes: list[Node]
    here: int | None = 0
    """Which of the nodes this process starts itself; None: all are started over ssh."""
    master_address: str = "127.0.0.1"
    """Where the ranks meet; empty: the first node's address."""
    master_port: int = 0
    """0: any free one."""
    run_id: str = ""
    hang_seconds: float = 0.0
    lease: float = 60.0
    ssh_arguments: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return sum(len(node.slots) for node in self.nodes)

    def share(self, index: int, address: str, port: int) -> Share:
        """What node ``index`` does."""
        before = [len(node.slots) for node in self.nodes[:index]]
        node = self.nodes[index]
        return Share(
            argv=self.argv,
            environment=self.environment,
            first_rank=sum(before),
            ranks=len(node.slots),
            world_size=self.world_size,
            master_address=address,
            master_port=port,
            hang_seconds=self.hang_seconds,
            devices=node.devices,
        )


def build(options: argparse.Namespace, settings: TrainConfig) -> Job:
    """Check the nodes and this one's devices; describe what to start."""
    argv = [sys.executable, "-u", str(Path(options.script).absolute())]
    argv += [*(["--preflight"] if options.preflight else []), *options.rest]
    nodes = _nodes(options)
    remote = options.hostfile is not None and not options.no_ssh and not _only_here(nodes)
    run_id = secrets.token_hex(8)
    environment = _own_environment(handed_on_only=remote)
    environment |= {START_SECONDS: str(options.start_timeout), ranks.RUN_ID: run_id}
    if not options.no_ssh:  # there each node starts its own ranks: nobody could share a secret
        environment.setdefault(rendezvous.TOKEN, secrets.token_hex(16))
    here: int | None = None
    if not remote:
        here = options.node_rank if options.no_ssh else 0
        nodes = _on_this_node(options, nodes, environment, here or 0)
    port = options.master_port or 0
    if options.no_ssh and not port:
        port = _agreed_port(settings.run.dir)
    return Job(
        argv=argv,
        environment=environment,
        nodes=nodes,
        here=here,
        master_address=options.master_addr or ("" if remote else "127.0.0.1"),
        master_port=port,
        run_id=run_id,
        hang_seconds=settings.faults.hang_seconds,
        lease=options.lease,
        ssh_arguments=_ssh_arguments(options),
    )


def _nodes(options: argparse.Namespace) -> list[Node]:
    """The nodes of the host file that are used; one without ranks yet where there is none."""
    if options.hostfile is None:
        return [Node("localhost", ())]
    nodes = hosts.select(
        hosts.read(Path(options.hostfile)),
        include=options.include or "",
        exclude=options.exclude or "",
        count=options.num_nodes,
    )
    if options.no_ssh and options.node_rank >= len(nodes):
        raise ConfigError(f"--node_rank: {options.node_rank} of {len(nodes)} nodes")
    return hosts.with_ranks(nodes, options.nproc) if options.nproc else nodes


def _only_here(nodes: Sequence[Node]) -> bool:
    here = ("localhost", "127.0.0.1", socket.gethostname())
    return len(nodes) == 1 and nodes[0].host in here


def _own_environment(*, handed_on_only: bool) -> dict[str, str]:
    """This shell's variables for the ranks; for other nodes, those that are meant for all."""
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", rendezvous.STORE_FD)
    own = {key: value for key, value in os.environ.items() if key not in left_out}
    if not handed_on_only:
        return own
    return {k: v for k, v in own.items() if k.startswith(_HANDED_ON)} | _environment_file()


def _environment_file() -> dict[str, str]:
    """``NAME=value`` lines of .deepspeed_env, in the home directory or here."""
    found: dict[str, str] = {}
    for folder in (Path.home(), Path.cwd()):
        path = folder / _ENVIRONMENT_FILE
        if path.is_file():
            for line in path.read_text().splitlines():
                name, sign, value = line.partition("=")
                if sign and not line.lstrip().startswith("#"):
                    found[name.strip()] = value.strip()
    return found


def _on_this_node(
    options: argparse.Namespace, nodes: list[Node], environment: dict[str, str], here: int
) -> list[Node]:
    """The nodes with the ranks of this one settled by the devices it has."""
    import torch

    gpus = 0 if environment.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    wanted = len(nodes[here].slots) or options.nproc or gpus or CPU_RANKS
    if gpus == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    elif wanted > gpus:
        raise ConfigError(f"--nproc: {wanted} ranks, but this node shows {gpus} GPU(s)")
    environment.setdefault("OMP_NUM_THREADS", str(omp_threads(wanted)))
    if nodes[here].slots:
        return nodes
    return [Node(nodes[here].host, tuple(range(wanted)))]


def _agreed_port(run_dir: str) -> int:
    """A port that nodes which cannot ask each other agree on: drawn from the run's directory."""
    digest = hashlib.sha256(run_dir.encode()).digest()
    return 20_000 + int.from_bytes(digest[:4], "big") % 10_000


def _ssh_arguments(options: argparse.Namespace) -> tuple[str, ...]:
    try:
        given = shlex.split(options.ssh_args or "")
    except ValueError as error:
        raise ConfigError(f"--ssh_args: {error}") from None
    port = ["-p", str(options.ssh_port)] if options.ssh_port else []
    return (*port, *given)
