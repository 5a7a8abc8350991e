"""512 ranks and 14.2 M samples on one machine, without training.

What every rank computes for itself is computed here for one rank after another: the manifest, the
order, the shares, the shards it reads, its index memory, its part of a checkpoint. A fake process
group stands for the others, so the network's time is not in it.

    python benchmarks/scale.py [--ranks 512] [--samples 14200000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from multiprocessing import context, popen_forkserver, reduction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from l2vit.data.batch import TrainPlanner
from l2vit.data.config import DataConfig, SubsetConfig
from l2vit.data.loader import open_reader
from l2vit.data.manifest import Manifest, Shard
from l2vit.data.order import SampleOrder, Share, split
from l2vit.data.shards import ShardReader
from l2vit.data.subset import subset_ids
from l2vit.train import checkpoint, preflight
from l2vit.train.checkpoint import CheckpointMeta, Part, Reader, TensorSlice
from l2vit.train.preflight import Facts

SHARD_SAMPLES = 9_700
"""Samples of a 1 GiB shard of 110 kB images."""
MEASURED_RANKS = 4


def measured(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, seconds, MiB that stay allocated)."""
    tracemalloc.start()
    result = action()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    began = time.perf_counter()
    action()
    return result, time.perf_counter() - began, kept / 2**20


def make_manifest(samples: int, classes: int) -> Manifest:
    """The manifest of a data set nobody has to download."""
    counts = [SHARD_SAMPLES] * (samples // SHARD_SAMPLES)
    if rest := samples % SHARD_SAMPLES:
        counts.append(rest)
    shards = tuple(
        Shard(f"shard-{i:06d}.tar", n, n * 110_000, f"{i:064x}", f"{i:064x}")
        for i, n in enumerate(counts)
    )
    per_class = [samples // classes + (i < samples % classes) for i in range(classes)]
    names = tuple(f"n{i:08d}" for i in range(classes))
    return Manifest("simulated", "train", names, shards, tuple(per_class))


def simulate_order(manifest: Manifest, ranks: int, batch: int, chunk: int) -> dict[str, float]:
    """Order and shares: time and memory of a rank, and that every sample comes exactly once."""
    counts = [shard.samples for shard in manifest.shards]

    def make() -> SampleOrder:
        order = SampleOrder(manifest.hash, counts, seed=0, chunk=chunk, global_batch=batch)
        order.batch_ids(0)
        return order

    order, seconds, mebibytes = measured(make)
    began = time.perf_counter()
    ids = order.epoch_ids(0)
    whole_epoch = time.perf_counter() - began
    seen = np.bincount(ids, minlength=manifest.samples)
    micro = batch // ranks
    shares = [Share(rank, split(batch, world=ranks, micro_batch=micro)) for rank in range(ranks)]
    places = np.concatenate([s.places(a) for s in shares for a in range(s.split.accumulation)])
    plan = TrainPlanner(order, shares[-1], images_seen=batch * (order.steps_per_epoch // 2))
    began = time.perf_counter()
    plan.plan(0)
    resume = time.perf_counter() - began
    return {
        "order_seconds": seconds,
        "order_mib": mebibytes,
        "epoch_ids_seconds": whole_epoch,
        "resume_seconds": resume,
        "batches_an_epoch": order.steps_per_epoch,
        "samples_left_out": int(manifest.samples - len(ids)),
        "samples_twice": int((seen > 1).sum()),
        "places_missing_in_a_step": int(batch - len(np.unique(places))),
    }


def simulate_reading(
    manifest: Manifest, ranks: int, batch: int, chunk: int, folder: Path
) -> dict[str, float]:
    """Shards a rank reads at once and in an epoch, and the memory of their indexes."""
    counts = [shard.samples for shard in manifest.shards]
    order = SampleOrder(manifest.hash, counts, seed=0, chunk=chunk, global_batch=batch)
    firsts, micro = manifest.first_ids, batch // ranks
    window = min(order.steps_per_epoch, order.chunk)
    at_once, in_all = [], []
    for rank in np.linspace(0, ranks - 1, MEASURED_RANKS).astype(int):
        places = Share(int(rank), split(batch, world=ranks, micro_batch=micro)).places(0)
        steps = np.arange(order.steps_per_epoch)[:, None] * batch
        ids = order.ids_at(0, (steps + places).ravel()).reshape(-1, micro)
        shards = np.searchsorted(firsts, ids, side="right") - 1
        at_once.append(len(np.unique(shards[:window])))
        in_all.append(len(np.unique(shards)))
    opened = 8
    _write_indexes(folder, manifest, opened)
    reader = ShardReader(folder, manifest)

    def look() -> None:
        for shard in range(opened):
            reader.key_of(int(firsts[shard]))

    _, _, mebibytes = measured(look)
    return {
        "shards": len(counts),
        "shards_at_once": float(np.mean(at_once)),
        "shards_an_epoch": float(np.mean(in_all)),
        "run_of_neighbours": order.chunk,
        "index_mib_a_shard": mebibytes / opened,
        "index_mib": mebibytes / opened * float(np.mean(at_once)),
    }


class _Starting:
    """Stands for a worker process being started, and takes the descriptors it would be given."""

    DupFd = popen_forkserver._DupFd  # type: ignore[attr-defined]

    def duplicate_for_child(self, descriptor: int) -> int:
        return descriptor


def simulate_workers(
    manifest: Manifest, batch: int, chunk: int, fraction: float, folder: Path
) -> dict[str, float]:
    """What a worker process is sent of the shards and of a subset, and what a rank keeps."""
    counts = [shard.samples for shard in manifest.shards]

    def make() -> tuple[ShardReader, SampleOrder]:
        drawn = SubsetConfig(fraction=fraction)
        subset = subset_ids(drawn, folder, manifest, seed=0)
        order = SampleOrder(
            manifest.hash, counts, seed=0, chunk=chunk, global_batch=batch, subset=subset
        )
        return open_reader(DataConfig(cache_dir=str(folder / "cache")), folder, manifest), order

    sent, _, mebibytes = measured(make)
    began = time.perf_counter()
    copied = len(pickle.dumps(sent))
    copying = time.perf_counter() - began
    context.set_spawning_popen(_Starting())  # type: ignore[arg-type]
    try:
        began = time.perf_counter()
        reference = len(reduction.ForkingPickler.dumps(sent))
        referring = time.perf_counter() - began
    finally:
        context.set_spawning_popen(None)
    return {
        "worker_bytes": reference,
        "worker_bytes_copied": copied,
        "worker_first_seconds": referring,
        "worker_copy_seconds": copying,
        "shards_and_subset_mib": mebibytes,
    }


def _write_indexes(folder: Path, manifest: Manifest, count: int) -> None:
    """Real indexes beside tars that are holes."""
    for shard in manifest.shards[:count]:
        lines = [f"v1.2 {shard.samples}"]
        for i in range(shard.samples):
            at, key = i * 112_000 + 512, f"n{i % 1000:08d}_{i}"
            lines.append(f"jpg {at} 110000 {key}.jpg cls {at + 110_592} 5 {key}.cls")
        (folder / shard.index_name).write_text("\n".join(lines) + "\n")
        with (folder / shard.name).open("wb") as stream:
            stream.truncate(shard.bytes)


def simulate_checkpoint(parameters: int, ranks: int, folder: Path) -> dict[str, float]:
    """Every rank's part written for real, the index committed, and read by another world."""
    rows = 4096
    tensors = max(1, parameters // (rows * 256))
    shape = (rows, parameters // tensors // rows)
    numel = shape[0] * shape[1]
    total = numel * tensors
    directory = checkpoint.step_directory(folder, 1)
    directory.mkdir(parents=True)
    cuts = [total * r // ranks for r in range(ranks + 1)]
    seconds, parts = [], []
    for rank in range(ranks):
        pieces = _pieces(cuts[rank], cuts[rank + 1], numel, shape)
        began = time.perf_counter()
        part = checkpoint.write_part(directory / checkpoint.part_name(rank, ranks), pieces)
        seconds.append(time.perf_counter() - began)
        parts.append(Part(part.name, part.bytes, part.sha256, part.pieces))
    meta = CheckpointMeta(1, 0, 4096, {}, ("a",), (), "", "")
    began = time.perf_counter()
    checkpoint.commit(directory, meta, parts)
    committed = time.perf_counter() - began
    reader, opening, mebibytes = measured(lambda: Reader(checkpoint.find(folder)))
    began = time.perf_counter()
    eighth = reader.read("param/w0", numel // 8, numel // 8)
    reading = time.perf_counter() - began
    expected = torch.arange(numel // 8, numel // 4, dtype=torch.float32)
    return {
        "checkpoint_gib": sum(part.bytes for part in parts) / 2**30,
        "files": ranks + 1,
        "part_mib": parts[0].bytes / 2**20,
        "part_seconds": float(np.median(seconds)),
        "part_seconds_worst": max(seconds),
        "commit_seconds": committed,
        "index_json_mib": (directory / checkpoint.META_NAME).stat().st_size / 2**20,
        "open_seconds": opening,
        "open_mib": mebibytes,
        "read_an_eighth_seconds": reading,
        "wrong_elements": int((eighth != expected).sum()),
    }


def _pieces(
    first: int, last: int, numel: int, shape: tuple[int, int]
) -> list[tuple[TensorSlice, torch.Tensor]]:
    found = []
    for number in range(first // numel, -(-last // numel)):
        start = max(first - number * numel, 0)
        length = min(last - number * numel, numel) - start
        values = torch.arange(start, start + length, dtype=torch.float32)
        for kind in ("param", "moment1", "moment2"):
            found.append((TensorSlice(f"{kind}/w{number}", shape, start, length), values))
    return found


def simulate_start(ranks: int) -> dict[str, float]:
    """Joining a (fake) group of that size, and judging that many ranks' facts."""
    began = time.perf_counter()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    dist.all_reduce(torch.ones(1))
    dist.barrier()
    joined = time.perf_counter() - began
    dist.destroy_process_group()
    same = {"torch": "2.11", "configuration": "a", "manifest": "b", "code": "c"}
    facts = [
        Facts(r, f"node{r // 8}", "H100", "580", 78.0, 1e9, same | {"torch": str(r == ranks - 1)})
        for r in range(ranks)
    ]
    began = time.perf_counter()
    problems = preflight.differences(facts)
    return {
        "join_fake_group_seconds": joined,
        "judge_facts_seconds": time.perf_counter() - began,
        "differences_found": len(problems),
    }


def simulate(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Everything, as one table."""
    manifest = make_manifest(options.samples, options.classes)
    manifest.save(folder)
    result: dict[str, float] = {"ranks": options.ranks, "samples": manifest.samples}
    _, result["manifest_seconds"], result["manifest_mib"] = measured(lambda: Manifest.load(folder))
    result |= simulate_workers(manifest, options.batch, options.chunk, options.fraction, folder)
    if options.workers_only:
        return result
    result |= simulate_start(options.ranks)
    result |= simulate_order(manifest, options.ranks, options.batch, options.chunk)
    result |= simulate_reading(manifest, options.ranks, options.batch, options.chunk, folder)
    result |= simulate_checkpoint(options.parameters, options.ranks, folder)
    return result


def main(argv: list[str] | None = None) -> int:
    """Simulate and print the table; exit status 1 if a sample was lost, doubled or misread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--samples", type=int, default=14_200_000)
    parser.add_argument("--classes", type=int, default=21_841)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--parameters", type=int, default=109_900_000)
    parser.add_argument("--fraction", type=float, default=0.5, help="of the samples, a subset")
    parser.add_argument("--workers-only", action="store_true", help="only what workers are sent")
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        result = simulate(options, Path(folder))
    for key, value in result.items():
        print(f"{key:<28}{value:>16,.4g}" if isinstance(value, float) else f"{key:<28}{value:>16,}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    wrong = ("samples_twice", "places_missing_in_a_step", "wrong_elements")
    return int(any(result.get(key) for key in wrong))


if __name__ == "__main__":
    raise SystemExit(main())
