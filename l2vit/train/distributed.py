"""Who this process is among the ranks, and the few things ranks say to each other."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from l2vit.errors import ConfigError, UserError
from l2vit.train import rendezvous

_DEFAULT_PORT = "29533"


def wait_for_ranks(wait: Callable[[], Any]) -> None:
    """Call ``wait``, which ends when other ranks have done their part; the watchdog looks for this
    function among those under way."""
    wait()


class PendingSum:
    """A sum over the ranks under way; nothing waits for it until it is read."""

    def __init__(self, summed: torch.Tensor, own: torch.Tensor, work: Any) -> None:
        self._values = torch.cat([torch.zeros_like(summed), own])
        self._summed, self._work = summed, work
        self._copied: torch.cuda.Event | None = None
        if summed.is_cuda:
            self._copy_aside()

    def _copy_aside(self) -> None:
        """Copy to the host on a stream of its own: the training stream must not wait for it."""
        device = self._values.device
        aside = _side_stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            if self._work is not None:
                self._work.wait()
                self._work = None
            self._values[: len(self._summed)] = self._summed
            for tensor in (self._values, self._summed):
                tensor.record_stream(aside)
            host = torch.empty(self._values.shape, dtype=self._values.dtype, pin_memory=True)
            host.copy_(self._values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(aside)
        self._values = host

    def read(self) -> list[float]:
        """The sums, then this rank's own values; waits until they are there."""
        if self._copied is not None:
            wait_for_ranks(self._copied.synchronize)
        else:
            if self._work is not None:
                wait_for_ranks(self._work.wait)
                self._work = None
            self._values[: len(self._summed)] = self._summed
        return self._values.tolist()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class World:
    """The place of this process in the job."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    launcher: str
    """torchrun (DeepSpeed's launcher too), slurm, mpi or none."""
    control: Any = None
    """A gloo group for host tensors, set by ``start``."""

    @property
    def main(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of float64 values over the ranks, equal on all of them."""
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def sum_later(self, values: torch.Tensor, own: torch.Tensor) -> PendingSum:
        """Begin to sum 1-D float64 ``values`` on ``device`` over the ranks, without waiting.

        Args:
            values: overwritten by the sum.
            own: 1-D float64, only carried along: values of this rank.
        """
        if self.size == 1:
            return PendingSum(values, own, None)
        group = None if values.is_cuda else self.control
        return PendingSum(values, own, dist.all_reduce(values, group=group, async_op=True))

    def max(self, value: float) -> float:
        """Largest of the ranks' values."""
        if self.size == 1:
            return float(value)
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return float(tensor.item())

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def raise_on_all_ranks(self, error: UserError | None) -> None:
        """Raise on every rank if any rank met an error, so that none waits for another.

        Raises:
            UserError: the first error; it names its rank where the ranks' errors are not the same.
        """
        errors = self.gather(None if error is None else (type(error), str(error)))
        met = [(rank, *found) for rank, found in enumerate(errors) if found is not None]
        if not met:
            return
        rank, kind, text = met[0]
        shared = len(met) == self.size and len({found[2] for found in met}) == 1
        raise kind(text if shared else f"rank {rank}: {text}")


def from_environment(environment: Mapping[str, str] | None = None) -> World:
    """Read the launcher's variables: the one place that knows their names.

    ``RANK``/``WORLD_SIZE`` (torchrun, deepspeed) come before Slurm's and Open MPI's, which may
    be there too when a launcher runs inside their allocation. Without any: one process.

    Raises:
        ConfigError: variables that contradict one another.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = "torchrun"
        names: tuple[str, ...] = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        launcher = "slurm"
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    elif "OMPI_COMM_WORLD_RANK" in env:
        launcher = "mpi"
        prefix = "OMPI_COMM_WORLD_"
        names = tuple(prefix + part for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    else:
        return World(0, 1, 0, 1, _device(0), "none")
    rank, size, local_rank = (_integer(env, name) for name in names[:3])
    local_size = _integer(env, names[3]) if names[3] in env else _integer(env, "LOCAL_SIZE", size)
    if not (0 <= rank < size and 0 <= local_rank < max(local_size, 1)):
        raise ConfigError(f"{names[0]}={rank} and {names[2]}={local_rank} do not fit the world")
    return World(rank, size, local_rank, local_size, _device(local_rank), launcher)


def _integer(env: Mapping[str, str], name: str, default: int = 0) -> int:
    text = env.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not a number") from None


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()};"
            " start as many processes per node as it has GPUs"
        )
    return torch.device("cuda", local_rank)


def start(world: World, *, timeout_seconds: float = 1800.0, run: str = "") -> World:
    """Join the process group (NCCL with GPUs, gloo without); ``stop`` leaves it again.

    Args:
        world: the place of this process.
        timeout_seconds: how long a collective may take.
        run: what identifies the run, such as its directory, where no launcher gave a token.

    Returns:
        The world with its control group.

    Raises:
        UnreachablePeers: the other ranks could not be met; names the address.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed insists on it
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        _fill_environment(world)
        store = rendezvous.meet(world.rank, world.size, run=run, one_host=_on_one_host(world))
        store.set_timeout(timeout)
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")
    return dataclasses.replace(world, control=control)


def _on_one_host(world: World) -> bool:
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))
    return world.size == world.local_size and (world.launcher != "slurm" or nodes == "1")


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "Connection" in text


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _fill_environment(world: World) -> None:
    """Give torch.distributed and DeepSpeed the names they read, whoever launched us."""
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("WORLD_SIZE", str(world.size))
    os.environ.setdefault("MASTER_ADDR", _first_host())
    os.environ.setdefault("MASTER_PORT", _DEFAULT_PORT)


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "")
    return first_host(nodes) if nodes else "127.0.0.1"


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: ``gpu[07-09,12],cpu1`` gives ``gpu07``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise ConfigError(f"Slurm node list {nodes!r} is not understood; set MASTER_ADDR")
    return match[1] + (match[2] or "")
