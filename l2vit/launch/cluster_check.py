"""``--preflight``: the ranks of a job measure their cluster instead of training on it."""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from l2vit import config as configuration
from l2vit.data.manifest import Manifest
from l2vit.data.order import mix_group, split
from l2vit.errors import UserError
from l2vit.plan.devices import DEVICES, Device
from l2vit.plan.estimate import Cluster, Work, estimate
from l2vit.train import distributed
from l2vit.train.config import TrainConfig
from l2vit.train.distributed import World
from l2vit.train.preflight import Facts, Problem, collect, differences, shared_directory

SECONDS = 15.0
"""Time the loaders are measured for, after their first batch."""
_LATENCY_CALLS = 50
_BANDWIDTH_CALLS = 5
SLOW_SHARE = {"cuda": 0.9, "cpu": 0.5}
"""A device below this share of the median is named; a CPU's cores may serve others meanwhile."""
_COMM_SHARE = 0.3
"""Communication may take this share of the computing time before it is called a problem."""


@dataclass(frozen=True)
class Speed:
    """How fast one rank's device is, all of them measured at once."""

    rank: int
    host: str
    tflops: float
    """Of a matrix product: bf16 on a GPU, fp32 on a CPU."""
    memory_gbs: float
    """Read and written by a copy."""


@dataclass(frozen=True)
class Need:
    """What a step asks of the cluster; zeros where the device's figures are not known."""

    gradient_bytes: int
    compute_seconds: float
    images_per_second_per_node: float


@dataclass(frozen=True)
class Measured:
    """What the cluster offers."""

    latency_us: float
    """Of an all-reduce of one number over all ranks."""
    bus_gbs: float
    """All-reduce of ``moved_mib``, as the bandwidth of a ring."""
    moved_mib: float
    images_per_second: dict[str, float]
    """Of the loaders, by host."""
    speeds: tuple[Speed, ...] = ()
    """Of each rank's device, by rank."""


def main(argv: Sequence[str]) -> int:
    """Check the cluster as this rank; every rank calls it.

    Args:
        argv: the arguments training would get.

    Returns:
        0 when nothing was found, 1 with problems; rank 0 prints the table and the fixes.
    """
    parser = argparse.ArgumentParser(prog="preflight")
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(argv)
    config = configuration.load(TrainConfig, options.config, options.overrides)
    world = distributed.start(distributed.from_environment(), run=config.run.dir)
    try:
        facts = collect(config, world)
        problems = differences(facts)
        problems += shared_directory(Path(config.run.dir), world)
        measured = measure(config, world)
        need = needed(config, world, facts)
        problems += judge(measured, need, ranks=world.size)
        problems += slow_devices(measured.speeds, SLOW_SHARE[world.device.type])
    finally:
        distributed.stop()
    if world.main:
        print(table(facts, measured, need, problems), flush=True)
    return 1 if problems else 0


def measure(config: TrainConfig, world: World) -> Measured:
    """Time collectives and loaders; the same answer on every rank."""
    device = world.device
    one = torch.zeros(1, device=device)
    latency = _timed(lambda: _reduce(one, world), _LATENCY_CALLS, device)
    elements = (256 if device.type == "cuda" else 16) * 2**18
    many = torch.zeros(elements, device=device)
    seconds = _timed(lambda: _reduce(many, world), _BANDWIDTH_CALLS, device)
    around = 2 * (world.size - 1) / world.size * many.nbytes
    return Measured(
        latency_us=world.max(latency) * 1e6,
        bus_gbs=around / world.max(seconds) / 1e9,
        moved_mib=many.nbytes / 2**20,
        images_per_second=_loading(config, world),
        speeds=_speeds(world),
    )


def _speeds(world: World) -> tuple[Speed, ...]:
    """Each rank's product and copy, the best of several: what else runs may only slow them."""
    device, gpu = world.device, world.device.type == "cuda"
    side, elements = (8192, 2**28) if gpu else (512, 2**23)
    square = torch.ones(side, side, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    product = torch.empty_like(square)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    world.barrier()
    multiply = min(
        _timed(lambda: torch.mm(square, square, out=product), 3, device) for _ in range(5)
    )
    copy = min(_timed(lambda: target.copy_(source), 3, device) for _ in range(5))
    own = Speed(
        world.rank,
        socket.gethostname(),
        tflops=2 * side**3 / multiply / 1e12,
        memory_gbs=2 * source.nbytes / copy / 1e9,
    )
    return tuple(world.gather(own))


def slow_devices(speeds: Sequence[Speed], share: float) -> list[Problem]:
    """The devices that are slower than ``share`` of the median: all others wait for them."""
    problems = []
    for name, unit in (("tflops", "TFLOP/s"), ("memory_gbs", "GB/s of memory")):
        middle = statistics.median(getattr(speed, name) for speed in speeds)
        problems += [
            Problem(
                f"rank {speed.rank} on {speed.host} does {getattr(speed, name):.3g} {unit},"
                f" the median is {middle:.3g}",
                "look for heat, a power limit, errors of its memory or another program there"
                " (nvidia-smi -q -d PERFORMANCE,ECC)",
            )
            for speed in speeds
            if getattr(speed, name) < share * middle
        ]
    return problems


def _reduce(tensor: torch.Tensor, world: World) -> None:
    if world.size > 1:
        dist.all_reduce(tensor)


def _timed(action: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds a call takes, the first one not counted."""
    action()
    _wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        action()
    _wait(device)
    return (time.perf_counter() - began) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _loading(config: TrainConfig, world: World, *, seconds: float = SECONDS) -> dict[str, float]:
    """Images a second by host, all ranks loading at once as in training."""
    problem: UserError | None = None
    rate = 0.0
    try:
        rate = _loader_rate(config, world, seconds)
    except UserError as error:
        problem = error
    world.raise_on_all_ranks(problem)
    rates: dict[str, float] = {}
    for host, images in world.gather((socket.gethostname(), rate)):
        rates[host] = rates.get(host, 0.0) + images
    return rates


def _loader_rate(config: TrainConfig, world: World, seconds: float) -> float:
    from l2vit.data.loader import train_loader

    manifest = Manifest.of_training(config.data)
    shares = split(
        config.schedule.global_batch,
        world=world.size,
        micro_batch=config.engine.micro_batch,
        multiple_of=mix_group(config.augment),
    )
    loader = train_loader(
        config.data,
        config.augment,
        manifest=manifest,
        split=shares,
        rank=world.rank,
        seed=config.run.seed,
        device=world.device,
    )
    try:
        # What was made ready ahead while nobody measured must not count.
        for _ in range(1 + config.data.prefetch):
            next(loader)
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            images += len(next(loader))
        _wait(world.device)
        return images / (time.perf_counter() - began)
    finally:
        loader.close()


def known_device(name: str) -> Device | None:
    """The built-in figures for a device that calls itself ``name``."""
    return next((d for key, d in DEVICES.items() if key in name.lower()), None)


def needed(config: TrainConfig, world: World, facts: Sequence[Facts]) -> Need:
    """What the plan says a step asks for."""
    device = known_device(facts[0].device)
    manifest = Manifest.load(Path(config.data.train))
    work = Work(manifest.samples, len(manifest.classes))
    cluster = Cluster(device or DEVICES["h100"], world.size, max(1, world.local_size))
    found = estimate(config, cluster, work)
    gradients = 4 * found.trace.parameters
    if device is None:
        return Need(gradients, 0.0, 0.0)
    rate = config.schedule.global_batch / (found.compute + found.communication)
    return Need(gradients, found.compute, rate / cluster.nodes)


def judge(measured: Measured, need: Need, *, ranks: int) -> list[Problem]:
    """Where the cluster offers less than a step needs."""
    problems = []
    seconds = reduce_seconds(measured, need, ranks)
    if need.compute_seconds and seconds > _COMM_SHARE * need.compute_seconds:
        problems.append(
            Problem(
                f"reducing the gradients takes {seconds * 1e3:.0f} ms, computing a step about"
                f" {need.compute_seconds * 1e3:.0f} ms",
                "see that NCCL uses the fast network (NCCL_DEBUG=INFO, NCCL_IB_HCA,"
                " NCCL_SOCKET_IFNAME)",
            )
        )
    for host, rate in measured.images_per_second.items():
        if rate < need.images_per_second_per_node:
            problems.append(
                Problem(
                    f"{host} loads {rate:,.0f} images/s, a step needs about"
                    f" {need.images_per_second_per_node:,.0f}",
                    "raise data.threads and data.prefetch, use data.backend=dali, or move the"
                    " shards to faster storage",
                )
            )
    return problems


def reduce_seconds(measured: Measured, need: Need, ranks: int) -> float:
    """Time of one all-reduce of the fp32 gradients at the measured speed."""
    if ranks == 1:
        return 0.0
    moved = 2 * (ranks - 1) / ranks * need.gradient_bytes
    return moved / (measured.bus_gbs * 1e9) + measured.latency_us * 1e-6


def table(
    facts: Sequence[Facts], measured: Measured, need: Need, problems: Sequence[Problem]
) -> str:
    """The report rank 0 prints."""
    middle = sorted(f.clock for f in facts)[len(facts) // 2]
    lines = [
        f"{'rank':>4}  {'host':<20} {'device':<28} {'driver':<12} {'free GiB':>8} {'clock':>8}"
    ]
    lines += [
        f"{f.rank:>4}  {f.host[:20]:<20} {f.device[:28]:<28} {f.driver:<12} {f.free_gib:>8.1f}"
        f" {f.clock - middle:>+7.2f}s"
        for f in facts
    ]
    lines += ["", "the same on every rank, unless named below:"]
    lines += [f"  {key:<14} {value}" for key, value in facts[0].same.items()]
    seconds = reduce_seconds(measured, need, len(facts))
    lines += [
        "",
        f"all-reduce latency     {measured.latency_us:,.0f} µs",
        f"all-reduce bandwidth   {measured.bus_gbs:.2f} GB/s (ring, {measured.moved_mib:.0f} MiB)",
        f"gradients of a step    {need.gradient_bytes / 2**20:,.0f} MiB: {seconds * 1e3:,.0f} ms"
        + (
            f", computing about {need.compute_seconds * 1e3:,.0f} ms"
            if need.compute_seconds
            else ""
        ),
    ]
    if need.compute_seconds:
        lines.append(
            f"computing a step       about {need.compute_seconds * 1e3:,.0f} ms (predicted)"
        )
    lines += speed_lines(measured.speeds)
    wanted = need.images_per_second_per_node
    asked = f" (a step needs about {wanted:,.0f})" if wanted else ""
    lines += [
        f"loading on {host:<12}{rate:,.0f} images/s{asked}"
        for host, rate in measured.images_per_second.items()
    ]
    lines += ["", f"{len(problems)} problem(s)" if problems else "no problems found"]
    lines += [f"  - {p.text}\n    fix: {p.fix}" for p in problems]
    return "\n".join(lines)


def speed_lines(speeds: Sequence[Speed]) -> list[str]:
    """Slowest, median and fastest device, in matrix products and in memory."""
    lines: list[str] = []
    if not speeds:
        return lines
    for label, name in (("product, TFLOP/s", "tflops"), ("memory, GB/s", "memory_gbs")):
        found = sorted(getattr(speed, name) for speed in speeds)
        middle = statistics.median(found)
        lines.append(f"{label:<23}{found[0]:.3g} to {found[-1]:.3g}, median {middle:.3g}")
    return lines
