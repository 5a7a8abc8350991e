"""Reading shards from a server: ours, webdataset's and mosaicml-streaming's, cold and warm.

A server in a process of its own gives the same pictures as our shards, which webdataset reads too,
and as mosaicml-streaming's own files (it is asked as an S3 server then). Everybody reads one epoch
of encoded pictures in one process, without decoding, and must bring every picture once. A round
has each contestant with an empty cache and then with the cache it has filled. Who is not installed
is left out by name.

    python benchmarks/remote.py [--images 2048] [--kilobytes 35] [--delay 0.01] [--rounds 3]
"""

from __future__ import annotations

import argparse
import functools
import http.server
import importlib.util
import multiprocessing
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

BATCH, CHUNK, SHARDS = 128, 256, 16


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, each request ``delay`` seconds late, and counts requests.

    ``GET`` and ``HEAD`` of ``/bucket/key`` are also all that S3 clients need to download.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a short answer after its head waits 40 ms

    def __init__(self, *given: object, count: Synchronized, delay: float, directory: str) -> None:
        self.count, self.delay = count, delay
        super().__init__(*given, directory=directory)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def _answer(self, *, with_content: bool) -> None:
        with self.count.get_lock():
            self.count.value += 1
        time.sleep(self.delay)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2] or size - 1) + 1) if found else (0, size)
        stop = min(stop, size)
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("ETag", '"same"')
        self.end_headers()
        if with_content:
            with path.open("rb") as stream:
                self.wfile.write(os.pread(stream.fileno(), stop - start, start))

    def log_message(self, *arguments: object) -> None:
        pass


def serve(directory: Path, port: int, count: Synchronized, delay: float) -> None:
    """Run the server until the process is ended."""
    made = functools.partial(Handler, count=count, delay=delay, directory=str(directory))
    http.server.ThreadingHTTPServer(("127.0.0.1", port), made).serve_forever()


def make_data(work: Path, images: int, kilobytes: int) -> None:
    """Shards by data_prep's own writer of ``images`` random JPEGs, and MDS files of the same."""
    from PIL import Image

    side = int((kilobytes * 1000 / 1.15) ** 0.5)
    for i in range(images):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side), np.uint8)
        path = work / "raw" / f"c{i % 10}" / f"p{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, "JPEG", quality=90)
    command = [
        sys.executable,
        "-m",
        "data_prep",
        "build",
        "--dataset",
        "folder",
        "--split",
        "train",
    ]
    command += ["--source", str(work / "raw"), "--out", str(work / "served" / "shards")]
    command += ["--workers", "1", "--shard-samples", str(-(-images // SHARDS))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if importlib.util.find_spec("streaming") is None:
        return
    from streaming import MDSWriter

    limit = sum(path.stat().st_size for path in (work / "raw").rglob("*.jpg")) // SHARDS
    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(work / "served" / "mds"), columns=columns, size_limit=limit) as out:
        for path in sorted((work / "raw").rglob("*.jpg"), key=lambda path: path.name):
            out.write({"image": path.read_bytes(), "label": int(path.parent.name[1:])})


def read_ours(address: str, cache: Path, gib: float) -> Iterator[int]:
    """Bytes of each picture of an epoch in our order, fetched ahead by its plan."""
    data = DataConfig(train=address, cache_dir=str(cache), cache_gib=gib, chunk=CHUNK)
    manifest = Manifest.of_training(data)
    shards = [shard.samples for shard in manifest.shards]
    order = SampleOrder(manifest.hash, shards, seed=0, chunk=CHUNK, global_batch=BATCH)
    split = Split(BATCH, 1, 1)
    planner = TrainPlanner(order, Share(0, split), 0)
    reader = open_reader(data, address, manifest, split)
    announced = 0
    for number in range(order.steps_per_epoch):
        for later in range(announced, min(number + reader.ahead + 1, order.steps_per_epoch)):
            reader.announce(planner.plan(later).ids)
            announced = later + 1
        for sample in planner.plan(number).ids.tolist():
            yield len(reader.read(sample).image)


def read_webdataset(urls: list[str], cache: Path | None) -> Iterator[int]:
    """webdataset's own pipeline: shuffled shards, a shuffle buffer; curl fetches whole tars."""
    import webdataset

    if cache is not None:
        cache.mkdir(exist_ok=True)
    dataset = webdataset.WebDataset(
        urls, shardshuffle=len(urls), cache_dir=str(cache) if cache else None, seed=0
    )
    for sample in dataset.shuffle(1000):
        yield len(sample["jpg"])


def read_mosaic(cache: Path) -> Iterator[int]:
    """mosaicml-streaming's shuffled epoch."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(
        remote="s3://mds", local=str(cache), shuffle=True, batch_size=BATCH, shuffle_seed=0
    )
    for sample in dataset:
        yield len(sample["image"])


@dataclass
class Contestant:
    """Who reads, from where; ``cache`` is the directory it may fill, None for no cache."""

    name: str
    read: Callable[[], Iterator[int]]
    cache: Path | None


@dataclass
class Measured:
    """One reading of all pictures."""

    sizes: list[int]
    seconds: float
    cpu_seconds: float
    requests: int


def contestants(work: Path, server: str) -> list[Contestant]:
    """Who is installed; prints who is not."""
    folder = next((work / "served" / "shards").rglob("manifest.json")).parent
    manifest = Manifest.load(folder)
    address = f"{server}/{folder.relative_to(work / 'served')}"
    gib = sum(shard.bytes for shard in manifest.shards) / 2**30
    urls = [f"{address}/{shard.name}" for shard in manifest.shards]
    whole, half, theirs, mosaic = (work / name for name in ("whole", "half", "wds", "mosaic"))
    found = [
        Contestant("ours", lambda: read_ours(address, whole, 2 * gib), whole),
        Contestant("ours, cache of half the data", lambda: read_ours(address, half, gib / 2), half),
    ]
    if importlib.util.find_spec("webdataset"):
        found += [
            Contestant("webdataset, no cache", lambda: read_webdataset(urls, None), None),
            Contestant("webdataset, cache_dir", lambda: read_webdataset(urls, theirs), theirs),
        ]
    if (work / "served" / "mds").exists():
        found.append(Contestant("mosaicml-streaming", lambda: read_mosaic(mosaic), mosaic))
    for package, module in (("webdataset", "webdataset"), ("mosaicml-streaming", "streaming")):
        if importlib.util.find_spec(module) is None:
            print(f"left out: {package} is not installed")
    return found


def measure(read: Callable[[], Iterator[int]], count: Synchronized) -> Measured:
    """Time, CPU time (child processes included) and requests of one reading."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    before, cpu_before, began = count.value, cpu(), time.perf_counter()
    sizes = list(read())
    seconds = time.perf_counter() - began
    return Measured(sizes, seconds, cpu() - cpu_before, count.value - before)


def compare(found: list[Contestant], count: Synchronized, rounds: int) -> None:
    """Read by everybody, cold and warm, ``rounds`` times in turn; print a table of medians."""
    rows: dict[str, list[Measured]] = {}
    for _ in range(rounds):
        for each in found:
            for state in ("cold", "warm") if each.cache else ("",):
                name = f"{each.name}, {state}" if state else each.name
                rows.setdefault(name, []).append(measure(each.read, count))
            if each.cache:
                shutil.rmtree(each.cache)
    expected = sorted(rows["ours, cold"][0].sizes)
    base = float(np.median([one.seconds for one in rows["ours, cold"]]))
    print("| | images/s | to ours, cold | images/CPU-s | requests | requests/s | MB/s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, runs in rows.items():
        if any(sorted(one.sizes) != expected for one in runs):
            raise SystemExit(f"{name} did not bring every picture once")
        seconds, cpu, requests = np.median(
            [(one.seconds, one.cpu_seconds, one.requests) for one in runs], axis=0
        )
        print(
            f"| {name} | {len(expected) / seconds:,.0f} | {base / seconds:.2f}"
            f" | {len(expected) / cpu:,.0f} | {requests:.0f} | {requests / seconds:.1f}"
            f" | {sum(expected) / seconds / 1e6:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2048, help=f"a multiple of {BATCH}")
    parser.add_argument("--kilobytes", type=int, default=35, help="of a picture, about")
    parser.add_argument("--delay", type=float, default=0.01, help="seconds before each answer")
    parser.add_argument("--rounds", type=int, default=3)
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
        address = f"http://127.0.0.1:{port}"
        os.environ |= {"S3_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
        try:
            compare(contestants(work, address), count, options.rounds)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
