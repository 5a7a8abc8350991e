"""The engine against plain PyTorch, saving, continuing, and 1 → 2 ranks, in one run.

`python benchmarks/engine.py --json FILE` (CPU here; on GPU nodes ranks use one GPU each).

- overhead: a ZeRO-1 step of one rank against the plain PyTorch step of the same model, batch,
  precision policy (bf16 copy, fp32 masters, fp32 gradients) and AdamW, alternating in one process;
- stall: how long a background save keeps training waiting, and what the whole save takes;
- resume: from the start of a bare Python process to its first optimizer step, imports apart;
- scaling: images per second on 1 and 2 ranks at the same micro-batch.

Every figure is a median; on a shared machine run it twice.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not Path("/dev/nvidiactl").exists():  # asked without torch: its import is measured below
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parents[1]


def settings(options: argparse.Namespace, world: int, run: str = "") -> Any:
    """The configuration every measurement shares; weak scaling over ``world``."""
    from l2vit.train.config import ModelConfig, RunConfig, ScheduleConfig, TrainConfig

    config = TrainConfig(
        run=RunConfig(dir=run),
        model=ModelConfig(name=options.model, window_size=options.window),
        schedule=ScheduleConfig(global_batch=options.batch * world),
    )
    config.data.input_size = options.size
    config.engine.zero_stage = 1
    config.model.drop_path_rate = 0.2
    return config


def make_network(config: Any, classes: int) -> Any:
    """The configured network."""
    from l2vit.train import model

    return model.from_config(config, classes=classes)


def make_engine(options: argparse.Namespace, world: Any) -> Any:
    """An engine and its configuration."""
    from l2vit.data.order import split
    from l2vit.train.engine import Engine

    config = settings(options, world.size)
    network = make_network(config, options.classes)
    shares = split(config.schedule.global_batch, world=world.size)
    sections = (config.engine, config.optim, config.ema)
    return Engine(network, *sections, world=world, split=shares)


def batch(options: argparse.Namespace, device: Any) -> tuple[Any, Any]:
    """Random pictures (B, 3, S, S) and soft targets (B, classes)."""
    import torch

    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, options.classes, (options.batch,), device=device)
    return images, torch.nn.functional.one_hot(labels, options.classes).float()


def engine_step(engine: Any, images: Any, targets: Any) -> None:
    """One optimizer step of the engine."""
    logits = engine.forward(images)
    engine.backward(-(targets * logits.log_softmax(1)).sum(1).mean())
    engine.step(lr=1e-3, weight_decay=0.05)


class PlainStep:
    """The same step in plain PyTorch: fp32 masters, a bf16 copy that computes."""

    def __init__(self, model: Any, device: Any) -> None:
        import torch

        self.master = copy.deepcopy(model).to(device).train()
        self.worker = copy.deepcopy(self.master)
        for parameter in self.worker.parameters():
            parameter.data = parameter.data.bfloat16()
        fused = True if device.type == "cuda" else None
        self.optimizer = torch.optim.AdamW(
            self.master.parameters(), lr=1e-3, weight_decay=0.05, fused=fused
        )

    def __call__(self, images: Any, targets: Any) -> None:
        import torch

        logits = self.worker(images.bfloat16()).float()
        (-(targets * logits.log_softmax(1)).sum(1).mean()).backward()
        masters = list(self.master.parameters())
        workers = list(self.worker.parameters())
        for high, low in zip(masters, workers, strict=True):
            high.grad = low.grad.float()
            low.grad = None
        torch.nn.utils.get_total_norm([p.grad for p in masters]).isfinite().item()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(workers, masters)


def seconds(action: Any, device: Any) -> float:
    """How long ``action`` takes; on a GPU between two events, the queue drained before."""
    import torch

    if device.type != "cuda":
        began = time.perf_counter()
        action()
        return time.perf_counter() - began
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    action()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def measure_overhead(options: argparse.Namespace, world: Any) -> dict[str, float]:
    """Median step of both, in turns, so that a busy machine slows both alike."""
    plain = PlainStep(make_network(settings(options, 1), options.classes), world.device)
    engine = make_engine(options, world)
    images, targets = batch(options, world.device)
    times: dict[str, list[float]] = {"plain": [], "engine": []}
    for i in range(options.steps + 2):
        one = seconds(lambda: plain(images, targets), world.device)
        two = seconds(lambda: engine_step(engine, images, targets), world.device)
        if i >= 2:
            times["plain"].append(one)
            times["engine"].append(two)
    ratios = [e / p for e, p in zip(times["engine"], times["plain"], strict=True)]
    engine.close()
    return {
        "plain_step_seconds": statistics.median(times["plain"]),
        "engine_step_seconds": statistics.median(times["engine"]),
        "overhead_ratio": statistics.median(ratios),
    }


def measure_stall(options: argparse.Namespace, world: Any) -> dict[str, float]:
    """Copy to host (training waits) and write (it does not), beside a step."""
    from l2vit.train.checkpoint import CheckpointMeta
    from l2vit.train.config import CheckpointConfig
    from l2vit.train.saver import Saver

    engine = make_engine(options, world)
    images, targets = batch(options, world.device)
    for _ in range(2):
        engine_step(engine, images, targets)
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), CheckpointConfig(), world=world, keep_every=0)
        steps, stalls, totals = [], [], []
        for number in range(max(3, options.steps // 4)):
            meta = CheckpointMeta(number, 0, 0, {}, (), (), "", "")
            saver.start(engine, meta)
            saver.finish()
            stalls.append(saver.stalled_seconds)
            totals.append(saver.seconds)
            steps.append(seconds(lambda: engine_step(engine, images, targets), world.device))
    engine.close()
    return {
        "save_stall_seconds": statistics.median(stalls),
        "save_seconds": statistics.median(totals),
        "stall_in_steps": statistics.median(stalls) / statistics.median(steps),
    }


def measure_resume(options: argparse.Namespace) -> dict[str, float]:
    """A fresh process: seconds of imports, of everything else up to the first step."""
    command = [sys.executable, __file__, "--worker", "resume", *forwarded(options)]
    return answer_of(command)


def answer_of(command: list[str]) -> dict[str, float]:
    """What a worker printed last, as JSON; if it fails, its own last words are the error."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def worker_resume(options: argparse.Namespace) -> dict[str, float]:
    """Import, build, load a state of the same size, step."""
    began = time.perf_counter()
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  DeepSpeed needs it at the start
    import torch

    import l2vit.data.loader
    import l2vit.train.startup  # noqa: F401
    from l2vit.train import distributed

    imported = time.perf_counter()
    world = distributed.start(distributed.from_environment({}))
    engine = make_engine(options, world)
    held = {key: view.clone() for key, _, view in engine.tensors()}
    held |= {key: buffer.reshape(-1).clone() for key, buffer in engine.buffers().items()}
    engine.load(lambda key, start, numel: held[key][start : start + numel])
    ready = time.perf_counter()
    engine_step(engine, *batch(options, world.device))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    done = time.perf_counter()
    return {
        "resume_import_seconds": imported - began,
        "resume_build_seconds": ready - imported,
        "resume_first_step_seconds": done - ready,
        "resume_import_share": (imported - began) / (done - began),
    }


def measure_scaling(options: argparse.Namespace) -> dict[str, float]:
    """Images per second of 1 and 2 ranks through torchrun."""
    rates = {}
    for world in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", __file__, "--worker", "scaling"]
        command += forwarded(options)
        rates[world] = answer_of(command)["rate"]
    return {
        "images_per_second_1": rates[1],
        "images_per_second_2": rates[2],
        "scaling_1_to_2": rates[2] / rates[1],
    }


def worker_scaling(options: argparse.Namespace) -> dict[str, float]:
    """One rank: the job's images per second."""
    from l2vit.train import distributed

    world = distributed.start(distributed.from_environment())
    engine = make_engine(options, world)
    images, targets = batch(options, world.device)
    times = []
    for i in range(options.steps + 2):
        world.barrier()
        spent = seconds(lambda: engine_step(engine, images, targets), world.device)
        if i >= 2:
            times.append(world.max(spent))
    distributed.stop()
    rate = options.batch * world.size / statistics.median(times)
    return {"rate": rate} if world.main else {}


def forwarded(options: argparse.Namespace) -> list[str]:
    """The options a worker needs."""
    names = ("model", "window", "size", "batch", "steps", "classes")
    return [part for name in names for part in (f"--{name}", str(getattr(options, name)))]


def machine() -> str:
    """What the figures were measured on."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{len(os.sched_getaffinity(0))} CPU cores, {torch.get_num_threads()} threads a rank"


def main() -> None:
    """Run every measurement and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="l2vit_mini")
    parser.add_argument("--window", type=int, default=7)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=16, help="images per rank and step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--classes", type=int, default=21_841)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=("resume", "scaling"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        values = {"resume": worker_resume, "scaling": worker_scaling}[options.worker](options)
        if values:
            print(json.dumps(values), flush=True)
        return
    from l2vit.train import distributed

    world = distributed.start(distributed.from_environment({}))
    found: dict[str, Any] = {"machine": machine(), "options": vars(options) | {"json": ""}}
    found |= measure_overhead(options, world)
    found |= measure_stall(options, world)
    distributed.stop()
    found |= measure_resume(options)
    found |= measure_scaling(options)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
