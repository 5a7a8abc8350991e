"""Samples a second and requests of reading shards from a server: cold, warm, and against others.

An HTTP server in a process of its own serves the same pictures as our shards (also read front to
back by webdataset) and as mosaicml-streaming's own files, where that package is installed. Every
contestant gives encoded pictures and labels of one epoch, in one process, without decoding.

    python benchmarks/remote.py [--images 4000] [--kilobytes 50] [--delay 0.01]
"""

from __future__ import annotations

import argparse
import functools
import http.server
import importlib.util
import io
import multiprocessing
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from l2vit.data.batch import TrainPlanner
from l2vit.data.config import DataConfig
from l2vit.data.loader import open_reader
from l2vit.data.manifest import Manifest
from l2vit.data.order import SampleOrder, Share, Split
from l2vit.data.shard_cache import AHEAD_BATCHES

BATCH, CHUNK, SHARDS = 128, 256, 16


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, each request ``delay`` seconds late, and counts requests."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *given: object, count: Synchronized, delay: float, directory: str) -> None:
        self.count, self.delay = count, delay
        super().__init__(*given, directory=directory)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        with self.count.get_lock():
            self.count.value += 1
        time.sleep(self.delay)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found:
            data, status = data[int(found[1]) : int(found[2] or len(data)) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def serve(directory: Path, port: int, count: Synchronized, delay: float) -> None:
    """Run the server until the process is ended."""
    made = functools.partial(Handler, count=count, delay=delay, directory=str(directory))
    http.server.ThreadingHTTPServer(("127.0.0.1", port), made).serve_forever()


def make_data(work: Path, images: int, kilobytes: int) -> None:
    """Shards by data_prep's own writer of ``images`` random JPEGs, and MDS files of the same."""
    import subprocess

    from PIL import Image

    side = int((kilobytes * 1000 / 1.15) ** 0.5)
    for i in range(images):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side), np.uint8)
        path = work / "raw" / f"c{i % 10}" / f"p{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, "JPEG", quality=90)
    command = [sys.executable, "-m", "data_prep", "build", "--dataset", "folder", "--source"]
    command += [str(work / "raw"), "--out", str(work / "served" / "shards"), "--workers", "1"]
    command += ["--shard-samples", str(-(-images // SHARDS))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if importlib.util.find_spec("streaming") is None:
        return
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(work / "served" / "mds"), columns=columns, size_limit=1 << 24) as out:
        for path in sorted((work / "raw").rglob("*.jpg")):
            out.write({"image": path.read_bytes(), "label": int(path.parent.name[1:])})


def ours(address: str, cache: Path, gib: float) -> Iterator[int]:
    """Bytes of each picture of an epoch in our order, fetched ahead by its plan."""
    data = DataConfig(train=address, cache_dir=str(cache), cache_gib=gib, chunk=CHUNK)
    manifest = Manifest.of_training(data)
    shards = [shard.samples for shard in manifest.shards]
    order = SampleOrder(manifest.hash, shards, seed=0, chunk=CHUNK, global_batch=BATCH)
    planner = TrainPlanner(order, Share(0, Split(BATCH, 1, 1)), 0)
    reader = open_reader(data, address, manifest)
    announced = 0
    for number in range(order.steps_per_epoch):
        for later in range(announced, min(number + AHEAD_BATCHES, order.steps_per_epoch)):
            reader.announce(planner.plan(later).ids)
            announced = later + 1
        for sample in planner.plan(number).ids.tolist():
            yield len(reader.read(sample).image)


def webdatasets(address: str, names: list[str]) -> Iterator[int]:
    """Front to back through a shuffle buffer; the bytes come through Python, not curl."""
    import fsspec

    for name in names:
        whole = fsspec.open(f"{address}/{name}", "rb").open().read()
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None and not member.name.endswith(".cls"):
                    yield len(content.read())


def mosaics(address: str, cache: Path) -> Iterator[int]:
    """mosaicml-streaming's shuffled epoch."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        remote=address, local=str(cache), shuffle=True, batch_size=BATCH, shuffle_seed=0
    )
    for sample in dataset:
        yield len(sample["image"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--kilobytes", type=int, default=50, help="of a picture, about")
    parser.add_argument("--delay", type=float, default=0.01, help="seconds before each answer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_data(work, options.images, options.kilobytes)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = multiprocessing.Value("l", 0)
        server = multiprocessing.Process(
            target=serve, args=(work / "served", port, count, options.delay), daemon=True
        )
        server.start()
        time.sleep(1)
        try:
            _compare(work, f"http://127.0.0.1:{port}", count)
        finally:
            server.terminate()


def _compare(work: Path, server: str, count: Synchronized) -> None:
    manifest_path = next((work / "served" / "shards").rglob("manifest.json"))
    shards = f"{server}/{manifest_path.parent.relative_to(work / 'served')}"
    manifest = Manifest.load(manifest_path.parent)
    size = sum(shard.bytes for shard in manifest.shards) / 2**30
    names = [shard.name for shard in manifest.shards]
    rows = [
        ("ours, cold", lambda: ours(shards, work / "whole", 2 * size)),
        ("ours, warm", lambda: ours(shards, work / "whole", 2 * size)),
        ("ours, cache of half the data, cold", lambda: ours(shards, work / "half", size / 2)),
        ("tar front to back, no cache (webdataset's way)", lambda: webdatasets(shards, names)),
    ]
    if (work / "served" / "mds").exists():
        mds = f"{server}/mds"
        rows += [
            ("mosaicml-streaming, cold", lambda: mosaics(mds, work / "mosaic")),
            ("mosaicml-streaming, warm", lambda: mosaics(mds, work / "mosaic")),
        ]
    print("| | images/s | requests | requests/s | MB/s |\n|---|---|---|---|---|")
    for name, run in rows:
        before, began = count.value, time.perf_counter()
        sizes = list(run())
        seconds, requests = time.perf_counter() - began, count.value - before
        print(
            f"| {name} | {len(sizes) / seconds:,.0f} | {requests} | {requests / seconds:.1f}"
            f" | {sum(sizes) / seconds / 1e6:.0f} |",
            flush=True,
        )
    shutil.rmtree(work / "whole")


if __name__ == "__main__":
    main()
