"""Whether a GPU decodes regions of JPEGs without crashing, tried in a process of its own.

Some versions of nvImageCodec die of a segmentation fault at the first batch that
``decoders.image_slice`` decodes on an H100: no exception, the end of the process. So a process that
may die tries it first.

    python -m l2vit.data.dali_probe DEVICE LOAD     # prints "works"
"""

from __future__ import annotations

import functools
import io
import signal
import subprocess
import sys
import warnings

import numpy as np

from l2vit.data.dali import GraphInputs, build_graph

BATCHES, PICTURES, SIDE = 4, 32, 32
TIMEOUT = 180.0


@functools.cache
def region_decode_works(device: int, load: float) -> bool:
    """Try region decode on CUDA device ``device`` with a hardware decoder's share ``load``.

    Where it fails a warning of one line says so; whole pictures are then decoded and cut.
    """
    command = [sys.executable, "-m", "l2vit.data.dali_probe", str(device), str(load)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        reason = f"no answer in {TIMEOUT:.0f} s"
    else:
        if done.returncode == 0 and done.stdout.split()[-1:] == ["works"]:
            return True
        reason = _reason(done)
    warnings.warn(
        f"DALI cannot decode regions on GPU {device} ({reason}): decoding whole pictures instead",
        stacklevel=2,
    )
    return False


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
    return last[0][:200]


def _decode(device: int | None, load: float) -> None:
    """A few batches of regions of JPEGs."""
    batch = _batch()
    pipeline = build_graph(
        lambda: batch,
        batch=PICTURES,
        input_size=SIDE,
        interpolation="bicubic",
        threads=2,
        prefetch=2,
        gpu=device is not None,
        device_id=device,
        hw_decoder_load=load,
    )
    pipeline.build()
    for _ in range(BATCHES):
        pipeline.run()


def _batch() -> GraphInputs:
    from PIL import Image

    rng = np.random.default_rng(0)
    files = []
    for _ in range(PICTURES):
        pixels = rng.integers(0, 256, (375, 500, 3)).astype(np.uint8)
        memory = io.BytesIO()
        Image.fromarray(pixels).save(memory, "JPEG", quality=90)
        files.append(np.frombuffer(memory.getvalue(), np.uint8))
    corners = rng.integers(0, 100, (PICTURES, 2)).astype(np.int32)
    shapes = rng.integers(100, 250, (PICTURES, 2)).astype(np.int32)
    sizes = np.full((PICTURES, 2), SIDE, np.float32)
    none = np.zeros((PICTURES, 2), np.int32)
    return GraphInputs(files, corners, shapes, sizes, none, none[:, 0].copy())


if __name__ == "__main__":
    _decode(None if sys.argv[1] == "cpu" else int(sys.argv[1]), float(sys.argv[2]))
    print("works", flush=True)
