"""What data preparation costs, beside webdataset's own writer on the same images.

    python benchmarks/data_prep.py write [--images 8000] [--workers 1 2]
    python benchmarks/data_prep.py shuffle [--samples 14197122]
    python benchmarks/data_prep.py simulate [--samples 400000000]

``write`` makes 500x375 JPEGs from real photographs, packs them as an ImageNet-22k-shaped archive
and counts CPU seconds (all processes) of: a strict decode alone; ``build`` (check, hash, shuffle,
write, index); and the usual script of ``webdataset.ShardWriter`` after PIL has decoded each image.
``shuffle`` runs the real planning step over a synthetic listing as long as ImageNet-22k.
``simulate`` plans more images than the disk holds records of: they are made when the planner asks,
and the finished order is thrown away; all in between is the planner's own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import simplejpeg
from PIL import Image

if not __package__:  # run as a file: its own name would hide the package it measures
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep import plan
from data_prep.build import build
from data_prep.catalogue import CHUNK, Catalogue
from data_prep.options import Options
from data_prep.plan import make_plan
from data_prep.records import RECORD, UnitResult, Workspace, key_hash
from data_prep.sources import Unit
from data_prep.spill import RUN

FALL11_IMAGES = 14_197_122
FALL11_CLASSES = 21_841
FALL11_BYTES = 1.31e12


def photographs(count: int) -> list[bytes]:
    """Distinct 500x375 JPEGs: crops of scikit-learn's two photographs, enlarged and mirrored."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    made = []
    for number in range(count):
        photo = photos[number % 2]
        width = int(rng.integers(320, 540))
        height = width * 3 // 4
        left = int(rng.integers(0, photo.width - width))
        top = int(rng.integers(0, photo.height - height))
        picture = photo.crop((left, top, left + width, top + height)).resize((500, 375))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=int(rng.integers(80, 95)))
        made.append(stream.getvalue())
    return made


def write_archive(path: Path, images: list[bytes], classes: int) -> None:
    """One tar per class in one tar."""
    with tarfile.open(path, "w") as outer:
        for number in range(classes):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for place, data in enumerate(images[number::classes]):
                    _add(archive, f"n{number:08d}_{place}.JPEG", data)
            _add(outer, f"n{number:08d}.tar", inner.getvalue())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def cost(body: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds of all processes, wall seconds) of one call."""

    def spent() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        usage = [resource.getrusage(kind) for kind in kinds]
        return sum(item.ru_utime + item.ru_stime for item in usage)

    cpu, wall = spent(), time.monotonic()
    body()
    return spent() - cpu, time.monotonic() - wall


def decode_all(images: list[bytes]) -> None:
    """The floor: a full strict decode and nothing else."""
    for data in images:
        simplejpeg.decode_jpeg(data, "RGB", strict=True)


def shardwriter(archive: Path, out: Path, *, decode: bool) -> None:
    """The usual script: read the tars, let PIL check each image, hand it to ShardWriter."""
    import webdataset

    out.mkdir()
    with (
        tarfile.open(archive) as outer,
        webdataset.ShardWriter(str(out / "%06d.tar"), maxsize=1 << 30, verbose=0) as sink,
    ):
        for label, member in enumerate(outer):
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                for entry in inner:
                    data = inner.extractfile(entry).read()  # type: ignore[union-attr]
                    image = Image.open(io.BytesIO(data))
                    if decode:
                        image.load()
                    else:
                        image.verify()
                    key = entry.name.removesuffix(".JPEG")
                    sink.write({"__key__": key, "jpg": data, "cls": b"%05d" % label})


def run_write(arguments: argparse.Namespace) -> None:
    """Compare, in one run, on the same images."""
    images = photographs(arguments.images)
    mean = sum(map(len, images)) / len(images)
    print(f"{len(images):,} JPEGs of 500x375, {mean / 1000:.1f} KB on average")
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        root = Path(scratch)
        archive = root / "whole.tar"
        write_archive(archive, images, classes=20)
        for turn in range(arguments.repeats):
            jobs: dict[str, Callable[[], object]] = {
                "strict decode alone": lambda: decode_all(images),
                "PIL decode + ShardWriter": lambda: shardwriter(archive, root / "a", decode=True),
                "PIL verify() + ShardWriter": lambda: shardwriter(
                    archive, root / "b", decode=False
                ),
            }
            for workers in arguments.workers:
                options = Options(
                    "imagenet22k", (str(archive),), root / f"c{workers}", workers=workers
                )
                jobs[f"data_prep build, {workers} worker(s)"] = lambda o=options: build(o)
            for name, job in jobs.items():
                cpu, wall = cost(job)
                results[name] = max(results.get(name, 0.0), len(images) / cpu)
                print(
                    f"  round {turn + 1}: {name:32} {len(images) / cpu:8,.0f} images per CPU-s,"
                    f" {len(images) / wall:8,.0f} per second"
                )
            for path in root.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
    _conclude(results, arguments)


def _conclude(results: dict[str, float], arguments: argparse.Namespace) -> None:
    ours = results[f"data_prep build, {arguments.workers[0]} worker(s)"]
    peer = results["PIL decode + ShardWriter"]
    print(f"best of rounds: {json.dumps({k: round(v) for k, v in results.items()})}")
    print(f"build against PIL decode + ShardWriter: {ours / peer:.2f} times per CPU-second")
    hours = FALL11_IMAGES / ours / 3600
    print(
        f"14.2 million images of this size: {hours:.1f} CPU-hours, {60 * hours / 32:.0f} minutes on"
        " 32 cores if disks keep up; memory: one image a worker, a 64 MiB window a worker while"
        " writing, and the plan (see `shuffle`)"
    )


def synthetic_results(
    workspace: Workspace, samples: int, classes: int, *, keys: bool = True
) -> list[Unit]:
    """Result files as pass 1 would leave them, for a listing nobody has to download.

    Without ``keys`` the names are a few equal letters and the ranks are random numbers.
    """
    rng = np.random.default_rng(0)
    counts = np.diff(np.linspace(0, samples, classes + 1).astype(int))
    units = []
    for number, count in enumerate(counts.tolist()):
        records = np.zeros(count, RECORD)
        if keys:
            names = [f"n{number:08d}_{place}" for place in range(count)]
            texts = [f"{key}\t{key}.JPEG".encode() for key in names]
            records["rank"] = [key_hash(0, "order", key) for key in names]
        else:
            texts = [b"key\tname"] * count
            records["rank"] = rng.integers(0, 2**64, count, dtype=np.uint64)
        lengths = np.array([len(text) for text in texts])
        for name in ("sha_high", "sha_low", "phash"):
            records[name] = rng.integers(0, 2**63, count, dtype=np.uint64)
        records["size"] = rng.gamma(2.0, FALL11_BYTES / FALL11_IMAGES / 2, count) + 1000
        records["raw_size"] = records["size"]
        records["text_size"] = lengths
        records["text_offset"] = np.cumsum(lengths) - lengths
        records["unit"], records["row"], records["label"] = number, np.arange(count), number
        UnitResult(records, b"".join(texts), [], count, {"jpeg": count}).save(
            workspace.unit_result(number)
        )
        units.append(Unit(number, "tar", "none", "none", f"n{number:08d}"))
    return units


def run_shuffle(arguments: argparse.Namespace) -> None:
    """Plan a release of ImageNet-22k's length; report time and peak memory of the plan."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        workspace = Workspace(Path(scratch))
        workspace.create()
        start = time.monotonic()
        units = synthetic_results(
            workspace, arguments.samples, arguments.classes, keys=not arguments.no_keys
        )
        print(f"synthetic listing: {time.monotonic() - start:.0f} s", flush=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parts = ("train",) if arguments.no_keys else ("train", "val")
        options = Options(
            "imagenet22k",
            (),
            Path(scratch),
            split="train" if arguments.no_keys else "both",
            val_fraction=0.0 if arguments.no_keys else 0.01,
            workers=1,
        )
        classes = tuple(unit.class_id for unit in units)
        cpu, wall = cost(lambda: make_plan(options, workspace, units, classes, parts))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"plan of {arguments.samples:,} samples: {wall:.0f} s ({cpu:.0f} CPU-seconds), peak"
            f" memory {peak / 2**20:.2f} GiB (before it {before / 2**20:.2f} GiB)"
        )


class SimulatedCatalogue(Catalogue):
    """Records without a file: made when they are asked for."""

    def __init__(self, samples: int, units: int) -> None:
        self.starts = np.linspace(0, samples, units + 1).astype(np.int64)
        self.seen = np.diff(self.starts).tolist()
        self.listed_sources, self.renamed = [], {}

    def make(self, rows: np.ndarray, seed: int) -> np.ndarray:
        """Records of ``rows`` (ascending), with random hashes and sizes."""
        rng = np.random.default_rng(seed)
        records = np.zeros(len(rows), RECORD)
        for name in ("rank", "sha_high", "sha_low"):
            records[name] = rng.integers(0, 2**64, len(rows), dtype=np.uint64)
        records["unit"] = np.searchsorted(self.starts, rows, side="right") - 1
        records["row"] = rows - self.starts[records["unit"]]
        records["label"] = records["unit"]
        records["size"] = rng.integers(50_000, 150_000, len(rows))
        return records

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(self), CHUNK):
            yield start, self.make(np.arange(start, min(start + CHUNK, len(self))), start)


class SimulatedRuns:
    """What ``Spill`` gives back of so many records: runs sorted by rank that fit in memory."""

    def __init__(self, catalogue: SimulatedCatalogue) -> None:
        self._catalogue = catalogue
        self._count = 1 << max(0, (len(catalogue) - 1) // RUN).bit_length()

    def runs(self) -> Iterator[np.ndarray]:
        for number in range(self._count):
            rows = np.arange(number, len(self._catalogue), self._count)
            records = self._catalogue.make(rows, number)
            yield records[np.argsort(records["rank"], kind="stable")]

    def delete(self) -> None:
        pass


def run_simulate(arguments: argparse.Namespace) -> None:
    """Plan ``--samples`` images; report time, peak memory and shards."""
    catalogue = SimulatedCatalogue(arguments.samples, arguments.classes)
    units = [Unit(n, "tar", "none", "none", f"n{n:08d}") for n in range(arguments.classes)]

    class Discarded(plan._PartWriter):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self._stream = Path(os.devnull).open("wb")  # noqa: SIM115

    def no_parts(*_: object) -> SimulatedCatalogue:
        return catalogue

    def no_spill(*_: object) -> SimulatedRuns:
        return SimulatedRuns(catalogue)

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        workspace = Workspace(Path(scratch))
        workspace.create()
        workspace.text.touch()
        options = Options("imagenet22k", (), Path(scratch), split="train")
        with (
            patch.object(plan, "merge_results", no_parts),
            patch.object(plan, "sorted_by_rank", no_spill),
            patch.object(plan, "_PartWriter", Discarded),
        ):
            classes = tuple(unit.class_id for unit in units)
            made: list[plan.Plan] = []
            cpu, wall = cost(
                lambda: made.append(make_plan(options, workspace, units, classes, ("train",)))
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"plan of {arguments.samples:,} samples in {made[0].shards['train']:,} shards: {wall:.0f} s"
        f" ({cpu:.0f} CPU-seconds), peak memory {peak / 2**20:.2f} GiB"
    )


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", default=None, help="directory for temporary files")
    commands = parser.add_subparsers(required=True)
    write = commands.add_parser("write")
    write.add_argument("--images", type=int, default=8000)
    write.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    write.add_argument("--repeats", type=int, default=3)
    write.set_defaults(run=run_write)
    shuffle = commands.add_parser("shuffle")
    shuffle.add_argument("--samples", type=int, default=FALL11_IMAGES)
    shuffle.add_argument("--classes", type=int, default=FALL11_CLASSES)
    shuffle.add_argument(
        "--no-keys", action="store_true", help="no names and no split rule: for very many samples"
    )
    shuffle.set_defaults(run=run_shuffle)
    simulate = commands.add_parser("simulate")
    simulate.add_argument("--samples", type=int, default=400_000_000)
    simulate.add_argument("--classes", type=int, default=FALL11_CLASSES)
    simulate.set_defaults(run=run_simulate)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
