"""L²ViT against its peers: time, memory and growth, measured side by side in one process.

    OMP_NUM_THREADS=2 python benchmarks/model.py --out benchmarks/results/model.json
    python benchmarks/model.py --parts time growth --precisions fp32 --rounds 7
    python benchmarks/model.py --device cuda --batch 0   # compiled, MFU, kernels; as large as fits

Every round runs each model once, in turn, so that a slow moment of the machine hits all alike; the
figures are medians over the rounds, the ratios those of the medians. Writes a JSON file and, beside
it, a picture.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transcription import PaperL2ViT

import l2vit
from l2vit.files import write_json
from l2vit.models import ops
from l2vit.models.count import count_macs
from l2vit.models.l2vit import HEAD_WIDTH
from l2vit.models.ops.gpu import may_run

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY = ("l2vit_tiny", "swin_tiny_patch4_window7_224", "deit_small_patch16_224", "transcription")
OURS, PEER = TINY[:2]
BASE = ("l2vit_base", "swin_base_patch4_window7_224")
STAGES = {
    f"{name} stage {stage + 1}": (56 >> stage, dim << stage)
    for name, dim in (("L2ViT-T", 96), ("L2ViT-B", 128))
    for stage in range(4)
}
CLASSES, ACCUMULATION = 21_841, 4
H100_BF16 = 989e12  # dense bf16 operations per second of H100 SXM and H200, from NVIDIA's sheet


def build(name: str, device: str, dtype: torch.dtype, **arguments: Any) -> nn.Module:
    """A registered model, or the transcription of L²ViT-T, in the given precision."""
    torch.manual_seed(0)
    if name == "transcription":
        return PaperL2ViT(96, (2, 2, 6, 2)).to(device, dtype)
    model = timm.create_model(name, **arguments)
    return model.to(device, dtype)


def forward(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model(images)


def step(model: nn.Module, images: Tensor) -> None:
    """Forward and backward of one batch."""
    model.zero_grad(set_to_none=True)
    model(images).float().square().mean().backward()


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds of one call; on a GPU between two events, the queue drained before."""
    if device == "cuda":
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def medians(runs: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each run, interleaved; one unmeasured round first."""
    samples: dict[str, list[float]] = defaultdict(list)
    for index in range(rounds + 1):
        for name, run in runs.items():
            seconds = timed(run, device)
            if index:
                samples[name].append(seconds)
    return {name: statistics.median(values) for name, values in samples.items()}


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    """Forward and forward+backward of every model, and ratios to ``swin_tiny``."""
    result: dict[str, Any] = {}
    for precision in options.precisions:
        dtype = PRECISIONS[precision]
        models = {name: build(name, options.device, dtype) for name in options.models}
        images = torch.randn(options.batch, 3, 224, 224, device=options.device, dtype=dtype)
        for mode, call in (("forward", forward), ("forward+backward", step)):
            for model in models.values():
                model.train(mode != "forward")
            runs = {name: partial(call, model, images) for name, model in models.items()}
            seconds = medians(runs, options.rounds, options.device)
            base = seconds.get(PEER)
            ratios = {n: s / base for n, s in seconds.items()} if base else {}
            result[f"{precision} {mode}"] = {"seconds": seconds, "ratio_to_swin_tiny": ratios}
            print(
                f"{precision} {mode}:",
                *(f"{n} {s * 1e3:.0f} ms" for n, s in seconds.items()),
                flush=True,
            )
    return result


def measure_growth(options: argparse.Namespace) -> dict[str, Any]:
    """Forward time of one image at 224 and at 896 pixels: 16 times the tokens."""
    result = {}
    for precision in options.precisions:
        dtype = PRECISIONS[precision]
        model = build(OURS, options.device, dtype).eval()
        runs = {}
        for size in (224, 896):
            images = torch.randn(1, 3, size, size, device=options.device, dtype=dtype)
            runs[str(size)] = partial(forward, model, images)
        seconds = medians(runs, options.rounds, options.device)
        growth = seconds["896"] / seconds["224"]
        result[precision] = {"seconds": seconds, "growth": growth}
        print(f"{precision} 224 -> 896: {growth:.2f} times")
    return result


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """What PyTorch's tensors take at once during ``run``, beyond what they took before it, by the
    books of its allocator. (The process itself adds the holes of the C heap on CPUs.)"""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as books:
        run()
    events = books.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [e for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of a training step at its peak, gradients and activations, weights left out."""
    cases = {PEER: (PEER, False), OURS: (OURS, False), f"{OURS}, checkpointing": (OURS, True)}
    images = torch.randn(options.batch, 3, 224, 224, device=options.device)
    peak = {}
    for label, (name, checkpointing) in cases.items():
        model: Any = build(name, options.device, torch.float32).train()
        if checkpointing:
            model.set_grad_checkpointing()
        step(model, images)  # caches exist from now on
        model.zero_grad(set_to_none=True)
        peak[label] = peak_bytes(partial(step, model, images), options.device)
    ratios = {label: value / peak[PEER] for label, value in peak.items()}
    print("memory of a step:", *(f"{n} {v / 2**20:.0f} MiB" for n, v in peak.items()))
    return {"bytes": peak, "ratio_to_swin_tiny": ratios}


class TrainingStep:
    """An optimizer step on random pictures and labels, the network compiled."""

    def __init__(self, model: nn.Module, batch: int, device: str) -> None:
        self._images = torch.randn(batch, 3, 224, 224, device=device, dtype=torch.bfloat16)
        self._labels = torch.randint(0, CLASSES, (batch,), device=device)
        self._optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self._model = torch.compile(model)

    def __call__(self) -> None:
        for _ in range(ACCUMULATION):
            logits = self._model(self._images).float()
            nn.functional.cross_entropy(logits, self._labels).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def measure_gpu(options: argparse.Namespace) -> dict[str, Any]:
    """Compiled bf16 training steps of L²ViT-B and swin_base: images/s and FLOP utilisation.

    Whole steps of a pre-training run: 21,841 classes, drop path 0.2, ``ACCUMULATION``
    micro-batches, fused AdamW. The operations are those of the model (6 times the forward
    multiply-adds), whatever the kernels do; the peak is ``--peak``.
    """
    runs, macs = {}, {}
    for name in BASE:
        macs[name] = count_macs(timm.create_model(name, num_classes=CLASSES))
        model = build(name, options.device, torch.bfloat16, num_classes=CLASSES, drop_path_rate=0.2)
        model = model.to(memory_format=torch.channels_last).train()
        runs[name] = TrainingStep(model, options.batch, options.device)
        for _ in range(3):
            runs[name]()
    images = options.batch * ACCUMULATION
    seconds = medians(runs, options.rounds, "cuda")
    rate = {name: images / value for name, value in seconds.items()}
    mfu = {name: 6 * macs[name] * rate[name] / options.peak for name in BASE}
    print("gpu:", *(f"{n} {r:.0f} images/s, MFU {mfu[n]:.1%}" for n, r in rate.items()))
    ratio = rate[BASE[0]] / rate[BASE[1]]
    return {"images_per_second": rate, "mfu": mfu, "ratio": ratio, "batch": options.batch}


def largest_batch(name: str, start: int = 32) -> int:
    """The largest of 32, 64, ... images whose training step fits the GPU. The step is not compiled:
    that needs more memory, so what fits here should fit there."""
    model = build(name, "cuda", torch.bfloat16).train()
    fitting, batch = 0, start
    try:
        while True:
            step(model, torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16))
            fitting, batch = batch, 2 * batch
    except torch.OutOfMemoryError:
        pass  # outside, where the traceback no longer holds the step's tensors, memory is freed
    del model
    gc.collect()
    torch.cuda.empty_cache()
    if not fitting:
        raise SystemExit(f"{name}: not even {start} images fit this GPU; give --batch")
    return fitting


def kernel_cases(side: int, dim: int, batch: int, like: Tensor) -> dict[str, Any]:
    """What has a kernel, with inputs as a block of that stage gives them: {name: (call, inputs)}"""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=like.device, dtype=like.dtype, requires_grad=True)

    attend = partial(ops.linear_attention, num_heads=dim // HEAD_WIDTH, clamp=100.0)
    tokens = (random(batch, side * side, 3 * dim), random(dim // HEAD_WIDTH, 1, 1))
    cases: dict[str, Any] = {"linear_attention": (attend, tokens)}
    picture = random(batch, side, side, dim).detach().permute(0, 3, 1, 2).requires_grad_()
    for size in (3, 7):
        inputs = (picture, random(dim, 1, size, size), random(dim))
        cases[f"depthwise {size}x{size}"] = (ops.depthwise_conv, inputs)
    return cases


def measure_kernels(options: argparse.Namespace) -> dict[str, Any]:
    """Each kernel beside PyTorch, eager and compiled, at the shapes of every stage; then the whole
    compiled training step of L²ViT-B with and without. Ratios below 1: the kernel is faster."""

    def only_forward(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            call(*inputs)

    def both_ways(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        out = call(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    def switched(on: bool, run: Callable[[], None]) -> None:
        with ops.use_triton(on):
            run()

    result: dict[str, Any] = {}
    for precision in options.precisions:
        like = torch.empty(0, device=options.device, dtype=PRECISIONS[precision])
        for stage, (side, dim) in STAGES.items():
            for name, (call, inputs) in kernel_cases(side, dim, options.batch, like).items():
                torch.compiler.reset()
                compiled = torch.compile(call, dynamic=False)
                for mode, run in (("forward", only_forward), ("forward+backward", both_ways)):
                    ways = {
                        "kernel": partial(switched, True, partial(run, call, inputs)),
                        "eager": partial(switched, False, partial(run, call, inputs)),
                        "compiled": partial(switched, False, partial(run, compiled, inputs)),
                    }
                    seconds = medians(ways, options.rounds, options.device)
                    ratios = {
                        way: seconds["kernel"] / seconds[way] for way in ("eager", "compiled")
                    }
                    label = f"{precision} {stage} {name} {mode}"
                    result[label] = {"seconds": seconds, "kernel_to": ratios}
                    print(label, *(f"{way} {ratio:.2f}" for way, ratio in ratios.items()))
    torch.compiler.reset()
    model = build(BASE[0], options.device, torch.bfloat16)
    images = torch.randn(options.batch, 3, 224, 224, device=options.device, dtype=torch.bfloat16)
    whole = partial(step, torch.compile(model.train()), images)
    ways = {"with": partial(switched, True, whole), "without": partial(switched, False, whole)}
    seconds = medians(ways, options.rounds, options.device)
    ratio = seconds["with"] / seconds["without"]
    used_kernels = [
        k for k in ("linear_attention", "depthwise", "layer_norm") if may_run(k, images)
    ]
    result["training step"] = {"seconds": seconds, "with_to_without": ratio, "used": used_kernels}
    print(f"training step with kernels {used_kernels}: {ratio:.2f} of the time without")
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of the measured times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = result.get("time", {})
    if not cases:
        return
    figure, axes = pyplot.subplots(1, len(cases), figsize=(3.2 * len(cases), 3.4), squeeze=False)
    for axis, (case, found) in zip(axes[0], cases.items(), strict=True):
        names = [name.split("_patch")[0] for name in found["seconds"]]
        colours = ["#2f6db5" if name.startswith("l2vit") else "#b9bec6" for name in names]
        bars = axis.bar(names, [1e3 * s for s in found["seconds"].values()], color=colours)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_title(f"{case}, ms", fontsize=10)
        axis.tick_params(axis="x", rotation=30, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


ON_CPU = {"time": measure_time, "growth": measure_growth, "memory": measure_memory}
ON_GPU = {"gpu": measure_gpu, "kernels": measure_kernels, "growth": measure_growth}
PARTS = ON_CPU | ON_GPU


def machine(options: argparse.Namespace) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "cpu": named[0] if named else platform.processor(),
        "threads": torch.get_num_threads(),
        "batch": options.batch,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "l2vit": l2vit.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=None)
    parser.add_argument(
        "--precisions", nargs="+", choices=list(PRECISIONS), default=["fp32", "bf16"]
    )
    parser.add_argument("--models", nargs="+", default=list(TINY), help="timm names")
    parser.add_argument("--batch", type=int, default=8, help="0: as large as fits a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as PyTorch chooses")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peak", type=float, default=H100_BF16, help="bf16 operations per second")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/model.json"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.batch == 0:
        options.batch = min(largest_batch(name) for name in BASE)
    parts = options.parts or list(ON_GPU if options.device == "cuda" else ON_CPU)
    result: dict[str, Any] = {"machine": machine(options)}
    for part in parts:
        result[part] = PARTS[part](options)
        gc.collect()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    draw(result, options.out.with_suffix(".png"))
    print(json.dumps(result["machine"]), f"-> {options.out}")


if __name__ == "__main__":
    main()
