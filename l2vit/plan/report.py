"""An estimate as text for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from l2vit.plan.estimate import Estimate, gib
from l2vit.train.metrics import clock
from l2vit.train.schedule import Schedule

PICTURE_WIDTH, PICTURE_HEIGHT = 64, 9
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def values(found: Estimate, *, price: float = 0.0) -> dict[str, Any]:
    """Every predicted number, keys with units."""
    config, memory = found.config, found.memories
    result: dict[str, Any] = {
        "device": found.cluster.device.name,
        "ranks": found.cluster.ranks,
        "nodes": found.cluster.nodes,
        "images": found.work.images,
        "steps_per_epoch": found.steps_per_epoch,
        "steps": found.schedule.total,
        "warmup_steps": found.schedule.warmup,
        "micro_batch": found.split.micro_batch,
        "accumulation": found.split.accumulation,
        "parameters": found.trace.parameters,
        "flops": found.flops,
        "zero_stage": config.engine.zero_stage,
        "memory_gib": {s: round(gib(m.total), 2) for s, m in memory.items()},
        "compute_seconds": found.compute,
        "communication_seconds": found.communication,
        "data_seconds": found.data,
        "step_seconds": found.step,
        "binding": found.binding,
        "images_per_second": found.images_per_second,
        "mfu_percent": 100 * found.mfu,
        "evaluation_hours": found.evaluation / 3600,
        "days": found.seconds / 86400,
        "gpu_hours": found.gpu_hours,
        "checkpoint_gib": gib(found.checkpoint_bytes),
        "checkpoints_kept": found.checkpoints_kept,
        "checkpoint_disk_gib": gib(found.checkpoint_bytes * found.checkpoints_kept),
        "data_disk_gib": gib(found.work.images * found.work.bytes_per_image),
    }
    if price:
        result["cost"] = found.gpu_hours * price
    return result


def text(found: Estimate, *, price: float = 0.0) -> str:
    """The plan, to be printed."""
    cluster, schedule, split = found.cluster, found.schedule, found.split
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    lines = [
        f"PREDICTION for {found.config.model.name} on {cluster.ranks} × {cluster.device.name}"
        f" ({nodes}); nothing below was measured",
        "",
        *_rows(
            ("images × epochs", f"{found.work.images:,} × {_epochs(found):g}"),
            ("optimizer steps", f"{schedule.total:,} ({found.steps_per_epoch:,} an epoch)"),
            ("warm-up", f"{schedule.warmup:,} steps to a learning rate of {schedule.peak:g}"),
            (
                "global batch",
                f"{split.global_batch:,} = {cluster.ranks} ranks ×"
                f" micro-batch {split.micro_batch} × accumulation {split.accumulation}",
            ),
            ("parameters", f"{found.trace.parameters / 1e6:.1f} M"),
            ("arithmetic", f"{found.flops:.2e} floating-point operations"),
        ),
        "",
        picture(schedule),
        "",
        *_memory_table(found),
        "",
        *_rows(*_time_rows(found, price)),
    ]
    return "\n".join(lines)


def _epochs(found: Estimate) -> float:
    return round(found.schedule.total / found.steps_per_epoch, 2)


def _rows(*rows: tuple[str, str]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def _memory_table(found: Estimate) -> list[str]:
    """GiB a rank by ZeRO stage; the configured one is marked."""
    room = found.cluster.device.room_gib
    lines = [
        f"  memory of a rank, GiB (of {found.cluster.device.memory_gib:g}, less"
        f" {found.cluster.device.reserve_gib:g} for driver, NCCL, decoder, fragments)",
        "    stage  weights  gradients  optimizer  activations  total",
    ]
    for stage, memory in found.memories.items():
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
        weights, gradients, optimizer, activations = map(gib, parts)
        mark = "  <- configured" if stage == found.config.engine.zero_stage else ""
        fits = "" if gib(memory.total) <= room else "  DOES NOT FIT"
        lines.append(
            f"    {stage:>5}  {weights:7.2f}  {gradients:9.2f}  {optimizer:9.2f}"
            f"  {activations:11.2f}  {gib(memory.total):5.1f}{mark}{fits}"
        )
    return lines


def _time_rows(found: Estimate, price: float) -> Iterable[tuple[str, str]]:
    cluster = found.cluster
    need = found.split.global_batch / (found.compute + found.communication) / cluster.nodes
    offered = cluster.device.images_per_second * cluster.ranks / cluster.nodes
    disk = found.checkpoint_bytes * found.checkpoints_kept
    yield (
        "a step",
        (
            f"{found.step * 1e3:,.0f} ms: compute {found.compute * 1e3:,.0f}, communication"
            f" {found.communication * 1e3:,.0f}, data {found.data * 1e3:,.0f} (overlapped)"
        ),
    )
    yield "bound by", f"{found.binding}; model FLOP utilisation {100 * found.mfu:.0f}%"
    yield "speed", f"{found.images_per_second:,.0f} images/s"
    yield "data need", f"{need:,.0f} images/s a node, of {offered:,.0f} assumed to be offered"
    yield "evaluations", f"{found.evaluation / 3600:.1f} h in all"
    yield "whole run", f"{clock(found.seconds)} = {found.seconds / 86400:.2f} days"
    yield "GPU-hours", f"{found.gpu_hours:,.0f}"
    if price:
        yield "money", f"{found.gpu_hours * price:,.0f} at {price:g} a GPU-hour"
    kept = f"{found.checkpoints_kept} kept: {gib(disk):,.1f} GiB"
    yield "a checkpoint", f"{gib(found.checkpoint_bytes):.2f} GiB; {kept}"
    yield "the data", f"about {gib(found.work.images * found.work.bytes_per_image):,.0f} GiB"


def picture(schedule: Schedule) -> str:
    """The learning rate over the run, drawn with characters."""
    columns = range(PICTURE_WIDTH)
    steps = [round(c * (schedule.total - 1) / (PICTURE_WIDTH - 1)) for c in columns]
    heights = [schedule.lr(step) / schedule.peak * PICTURE_HEIGHT * 8 for step in steps]
    lines = []
    for row in reversed(range(PICTURE_HEIGHT)):
        cells = (_EIGHTHS[min(8, max(0, round(height) - 8 * row))] for height in heights)
        label = f"{schedule.peak:8.1e}" if row == PICTURE_HEIGHT - 1 else " " * 8
        lines.append(f"  {label} │{''.join(cells)}".rstrip())
    lines.append(f"  {schedule.lr(schedule.total - 1):8.1e} └{'─' * PICTURE_WIDTH}")
    end = f"{schedule.total:,} steps"
    lines.append(f"  learning{'0':>4}{end:>{PICTURE_WIDTH - 1}}")
    return "\n".join(lines)
