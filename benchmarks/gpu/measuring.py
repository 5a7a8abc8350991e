"""What the four GPU blocks share: options, clocks, a time limit, and where results go."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
MINUTES = 9.0


class Block:
    """One block's options, its results by name, and the time it has left."""

    def __init__(self, name: str, description: str, argv: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
        parser.add_argument("--minutes", type=float, default=MINUTES, help="start nothing later")
        parser.add_argument(
            "--dry-run", action="store_true", help="tiny sizes on the CPU, to see that it runs"
        )
        options = parser.parse_args(argv)
        self.name, self.dry = name, options.dry_run
        self.out: Path = options.out
        self._until = time.monotonic() + 60 * options.minutes
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.dtype = torch.bfloat16
        self.results: dict[str, Any] = {}
        if self.dry:
            torch.set_num_threads(1)

    def measure(self, name: str, run: Callable[[], Any]) -> None:
        """Note what ``run`` returns, or why it failed; skip it when the time is up."""
        if time.monotonic() > self._until:
            self.results[name] = {"skipped": "out of time"}
        else:
            try:
                self.results[name] = run()
            except Exception as error:
                if self.dry:
                    raise
                first = (str(error).strip().splitlines() or [""])[0]
                self.results[name] = {"error": f"{type(error).__name__}: {first}"[:300]}
                torch.cuda.empty_cache()
        print(f"{name}: {json.dumps(self.results[name])[:200]}", flush=True)
        self.write()

    def write(self) -> None:
        """Keep what there is: a block that is cut off leaves its results so far."""
        self.out.mkdir(parents=True, exist_ok=True)
        found = {"block": self.name, "dry_run": self.dry, **machine(self.device)}
        path = self.out / f"gpu_{self.name}.json"
        path.write_text(json.dumps({**found, "results": self.results}, indent=1) + "\n")

    def milliseconds(self, run: Callable[[], Any], *, rounds: int = 10) -> float:
        """Median time of one call, by CUDA events on a GPU; three unmeasured calls first."""
        rounds, warm = (1, 1) if self.dry else (rounds, 3)
        for _ in range(warm):
            run()
        return statistics.median(self._times(run, rounds))

    def _times(self, run: Callable[[], Any], rounds: int) -> list[float]:
        if self.device.type == "cpu":
            times = []
            for _ in range(rounds):
                began = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - began))
            return times
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(rounds)
        ]
        for begin, end in events:
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    def host_milliseconds(self, run: Callable[[], Any], *, rounds: int = 5) -> float:
        """Median time the host takes to launch one call, not waiting for the device."""
        times = []
        for _ in range(1 if self.dry else rounds):
            self.synchronize()
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
        self.synchronize()
        return statistics.median(times)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def peak(self, into: dict[str, Any]) -> Iterator[None]:
        """Note the most memory the allocator held inside, in GiB."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.device.type == "cuda":
            into["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}


def peak_tflops() -> float:
    """Peak of dense bf16 products of this device, by data sheet; an H100's on a CPU."""
    from l2vit.train.throughput import PEAK_TFLOPS

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 989.0)
