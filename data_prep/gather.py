"""``--gather``, for spinning disks: copy each shard's images together in one sequential pass.

By default the second pass reads each image where it lies in the source. That needs no extra disk
space but one random read an image, and a spinning disk does about a hundred of those a second.
With ``--gather`` the sources are read once more from front to back, each image is appended to a
file of its shard, and writing a shard is one sequential read. The copies take as much disk space
as the data until their shards are written.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.catalogue import unit_starts
from data_prep.pool import Progress, parallel_map
from data_prep.records import RECORD
from data_prep.shards import SourceFiles, WriteContext, read_texts, read_window, windows
from l2vit import files
from l2vit.errors import UserError

PLACE = np.dtype([("split", "i1"), ("shard", "<u4"), ("offset", "<u8")])
_TASK_BYTES = 2 << 30


def gather(writing: WriteContext, splits: Sequence[str], workers: int) -> None:
    """Fill the shard files of all splits; continues where a killed call stopped.

    Raises:
        UserError: the disk is full, or a source vanished or changed.
    """
    workspace = writing.workspace
    places = workspace.root / "places.npy"
    if not places.exists():
        with files.atomic_writer(places) as stream:
            np.save(stream, _places(writing, splits))
    tasks = list(_tasks(writing))
    left = [task for task in tasks if not workspace.done("gather", task[0]).exists()]
    progress = Progress("gather", sum(unit.size for unit in writing.units))
    job = _Job(writing, tuple(splits))
    for task, images in parallel_map(_gather, job, left, workers):
        progress.add(sum(writing.units[n].size for n in range(*task)), images)
    progress.finish()


class _Job:
    def __init__(self, writing: WriteContext, splits: tuple[str, ...]) -> None:
        self.writing, self.splits = writing, splits


def _places(writing: WriteContext, splits: Sequence[str]) -> np.ndarray:
    """PLACE (good images,) in unit order: which shard file each goes to, and where in it."""
    workspace = writing.workspace
    starts = unit_starts(workspace, len(writing.units))
    places = np.zeros(starts[-1], PLACE)
    places["split"] = -1
    for number, split in enumerate(splits):
        order = np.load(workspace.order(split), mmap_mode="r")
        bounds = np.load(workspace.bounds(split)).tolist()
        for shard, (start, stop) in enumerate(itertools.pairwise(bounds)):
            records = np.array(order[start:stop])
            rows = starts[records["unit"]] + records["row"]
            by_place = np.argsort(rows)
            sizes = records["size"][by_place].astype(np.int64)
            rows = rows[by_place]
            places["split"][rows], places["shard"][rows] = number, shard
            places["offset"][rows] = np.cumsum(sizes) - sizes
    return places


def _tasks(writing: WriteContext) -> Iterator[tuple[int, int]]:
    """Runs of units of about 2 GiB: (first, one past the last)."""
    start, size = 0, 0
    for unit in writing.units:
        size += unit.size
        if size >= _TASK_BYTES:
            yield start, unit.number + 1
            start, size = unit.number + 1, 0
    if start < len(writing.units):
        yield start, len(writing.units)


def _gather(job: _Job, task: tuple[int, int]) -> int:
    writing, workspace = job.writing, job.writing.workspace
    start, stop = unit_starts(workspace, len(writing.units))[list(task)].tolist()
    everything = np.memmap(workspace.records, RECORD, "r")
    records = np.array(everything[start:stop])
    places = np.load(workspace.root / "places.npy", mmap_mode="r")[start:stop]
    kept = np.flatnonzero(places["split"] >= 0)
    records, places = records[kept], places[kept]
    done = 0
    with SourceFiles() as sources:
        for span in windows(records):
            window = records[span]
            images = read_window(writing, sources, window, read_texts(writing, window))
            for place, image in zip(places[span], images, strict=True):
                path = workspace.gathered(job.splits[place["split"]], int(place["shard"]))
                try:
                    # Not synced: the reader checks every image and can fall back on the source.
                    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
                    try:
                        os.pwrite(descriptor, image, int(place["offset"]))
                    finally:
                        os.close(descriptor)
                except OSError as error:
                    raise UserError(f"cannot write {path}: {error.strerror}") from error
            done += len(window)
    files.write_json(workspace.done("gather", task[0]), done)
    return done
