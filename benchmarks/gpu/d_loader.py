"""Block D: the loader: does region decode work, how fast is it alone, what does it cost a run.

The run leaves a trace of two steps for https://ui.perfetto.dev beside the results.

python benchmarks/gpu/d_loader.py
python benchmarks/gpu/d_loader.py --dry-run     # on a CPU
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from measuring import ROOT, Block

LOADS = (0.0, 0.65, 1.0)
THREADS = (4, 8, 14)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PROBE = """
import sys, torch
from l2vit.data.config import AugmentConfig, DataConfig
from l2vit.data.loader import train_loader
from l2vit.data.manifest import Manifest
from l2vit.data.order import Split
from pathlib import Path
shards, device, load, batch = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
batches = train_loader(
    DataConfig(train=shards, backend="dali", threads=4, hw_decoder_load=load, input_size=64),
    AugmentConfig(), manifest=Manifest.load(Path(shards)), split=Split(batch, 1, 1), rank=0,
    seed=0, device=torch.device(device),
)
for _, found in zip(range(4), batches):
    assert found.images.isfinite().all()
print("works", flush=True)
import os; os._exit(0)
"""


def probe(block: Block, shards: Path, load: float) -> dict[str, Any]:
    """Decode four batches in a process of its own: a crash there is an answer, not the end."""
    command = [sys.executable, "-c", PROBE, str(shards), block.device.type, str(load)]
    command.append("16" if block.dry else "64")
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode == 0 and "works" in done.stdout:
        return {"works": True}
    died = signal.Signals(-done.returncode).name if done.returncode < 0 else done.returncode
    return {"works": False, "status": str(died), "last": done.stderr.strip()[-300:]}


def alone(block: Block, shards: Path, threads: int) -> dict[str, float]:
    """Images a second with nothing else to do."""
    import loader  # of benchmarks/, which ``measuring`` puts within reach

    options = argparse.Namespace(
        only=["ours dali"], rounds=1, batch=16 if block.dry else 256, threads=threads,
        images=32 if block.dry else 25_600, warmup=1 if block.dry else 8,
        device=block.device.type,
    )  # fmt: skip
    return loader.run_in_turn(shards, options)["ours dali"][0]


def run(block: Block, shards: Path, work: Path, threads: int) -> dict[str, Any]:
    """Sixty real steps of the training program: its speed and what it waited for data; after them
    two under the profiler, whose trace lies beside the results."""
    directory = work / f"run{threads}"
    steps = 2 if block.dry else 60
    traced = [steps + 2, steps + 3]
    micro = 8 if block.dry else 256
    name, size = ("l2vit_mini", 32) if block.dry else ("l2vit_base", 224)
    overrides = [
        f"run.dir={directory}", f"data.train={shards}", "data.val=", f"data.threads={threads}",
        f"model.name={name}", f"data.input_size={size}", f"schedule.global_batch={micro}",
        f"schedule.length={traced[1]} steps", f"log.profile_steps={traced}",
        "schedule.warmup=1 step", "log.every=1",
        f"engine.micro_batch={micro}", f"augment.mix_group={min(micro, 64)}",
        "checkpoint.every=1 epoch", "checkpoint.keep_every=0 steps", "eval.every=0 steps",
    ]  # fmt: skip
    command = [sys.executable, "-m", "pretrain", "train", "--config", str(RECIPE), *overrides]
    environment = dict(ENVIRONMENT)
    if block.dry:
        environment["DS_ACCELERATOR"] = "cpu"
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        raise RuntimeError(f"status {done.returncode}: {' | '.join(lines[-3:])}")
    records = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    kept = ("images_per_second", "mfu_percent", "data_wait_percent", "memory_gib")
    usual = [r for r in records if steps // 6 < r["step"] <= steps and "images_per_second" in r]
    found = {k: statistics.median(r[k] for r in usual) for k in kept if k in usual[0]}
    return {
        "steps": steps,
        "seconds": time.monotonic() - began,
        "trace": keep_trace(block, directory, threads),
        **found,
    }


def keep_trace(block: Block, run: Path, threads: int) -> str:
    """Compress the run's trace into the folder of results; its name there."""
    (trace,) = (run / "profile").glob("*.pt.trace.json")
    name = f"gpu_d_trace_{threads}_threads.json.gz"
    block.out.mkdir(parents=True, exist_ok=True)
    with trace.open("rb") as source, gzip.open(block.out / name, "wb") as target:
        shutil.copyfileobj(source, target)
    return name


RECIPE = ROOT / "pretrain" / "configs" / "in22k_base.yaml"


def main(argv: list[str] | None = None) -> None:
    """Run the block."""
    import loader

    block = Block("d_loader", "The loader and sixty real steps.", argv)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shards = loader.make_shards(work, 48 if block.dry else 8192)
        for load in LOADS[:1] if block.dry else LOADS:
            block.measure(f"region decode, hardware {load}", partial(probe, block, shards, load))
        for threads in (1,) if block.dry else THREADS:
            block.measure(f"alone, {threads} threads", partial(alone, block, shards, threads))
        for threads in (1,) if block.dry else THREADS[1:]:
            name = f"training, {threads} threads"
            block.measure(name, partial(run, block, shards, work, threads))


if __name__ == "__main__":
    main()
