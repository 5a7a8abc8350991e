"""Reading shards front to back, as a stream. Deprecated: an address in ``data.train`` keeps order.

Weaker than the indexed loaders, by the nature of a stream:

- a sample comes about once an epoch (each reader passes over its shards again and again), not
  exactly once; which one comes when depends on the numbers of ranks and workers and is mixed
  through a buffer only;
- a resumed run starts on freshly shuffled shards instead of seeking;
- a shard that breaks off is left there, and counts as one bad sample;
- the pil backend only.

What is done to a sample is the same as everywhere: drawn by (seed, epoch, sample).
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch

from l2vit.data import pil
from l2vit.data.augment import AugmentSampler
from l2vit.data.bad_samples import BadRecord
from l2vit.data.batch import BatchPlan, DecodedBatch, TrainPlanner
from l2vit.data.manifest import Manifest
from l2vit.data.rng import derive_key, permutation, uniforms
from l2vit.data.shards import (
    IMAGE_EXTENSIONS,
    BadSample,
    Sample,
    checksum,
    parse_label,
    read_checksums,
)

_Bad = dict[int, BadRecord]
"""What was bad since the last batch, by sample id."""


@dataclass
class StreamTrainSet(torch.utils.data.IterableDataset[DecodedBatch]):
    """Training micro-batches out of streamed shards; what a worker process iterates.

    The batch's places are those of the plan; the samples at them are what the stream brings.
    """

    url: str
    """Where a shard is: an address or ``pipe:`` command in which {shard} stands for its name."""
    directory: Path
    """Where the manifest was; checksum files there are used."""
    manifest: Manifest
    planner: TrainPlanner
    sampler: AugmentSampler
    seed: int
    buffer: int
    """Encoded samples a worker draws from at random."""
    limit: int
    """Bad samples of one batch after which to give up."""

    def __iter__(self) -> Iterator[DecodedBatch]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = self.planner.share
        bad: _Bad = {}
        items = self._decoded(share.rank * workers + worker, share.split.world * workers, bad)
        number = worker
        while True:
            plan = self.planner.plan(number)
            chosen = list(itertools.islice(items, len(plan.ids)))
            yield self._batch(plan, chosen, bad)
            if len(chosen) < len(plan.ids):
                return  # nothing comes: the batch says so
            bad.clear()
            number += workers  # the data loader takes workers in turn

    def _batch(
        self, plan: BatchPlan, items: list[tuple[Sample, np.ndarray]], bad: _Bad
    ) -> DecodedBatch:
        batch = DecodedBatch(
            plan,
            np.array([sample.id for sample, _ in items], np.int64),
            np.array([sample.label for sample, _ in items], np.int64),
            bad=list(bad.values()),
            complete=len(items) == len(plan.ids),
        )
        pictures = [picture for _, picture in items]
        return pil.augmented(batch, pictures, batch.ids, self.sampler)

    def _decoded(self, reader: int, readers: int, bad: _Bad) -> Iterator[tuple[Sample, np.ndarray]]:
        in_a_row, most = 0, self.manifest.samples + self.buffer  # more: there is no good one
        for sample, key, shard in self._mixed(reader, readers, bad):
            try:
                picture = pil.decode(sample.image)
            except BadSample as error:
                bad[sample.id] = BadRecord(sample.id, key, shard, str(error))
                in_a_row += 1
                if in_a_row > most or len(bad) > self.limit:
                    return
            else:
                in_a_row = 0
                yield sample, picture

    def _mixed(self, reader: int, readers: int, bad: _Bad) -> Iterator[tuple[Sample, str, str]]:
        """Samples (with key and shard) as they leave a shuffle buffer."""
        random = derive_key("stream", self.seed, self.planner.images_seen, reader)
        held: list[tuple[Sample, str, str]] = []
        for count, item in enumerate(self._samples(reader, readers, bad)):
            if len(held) < self.buffer:
                held.append(item)
                continue
            at = int(uniforms(random, np.array([count]), 1)[0, 0] * len(held))
            held[at], item = item, held[at]
            yield item

    def _samples(self, reader: int, readers: int, bad: _Bad) -> Iterator[tuple[Sample, str, str]]:
        """This reader's samples, pass after pass over shards shuffled anew.

        Ends where none come, or too many bad ones before a batch is full.
        """
        count = len(self.manifest.shards)
        for turn in itertools.count():
            key = derive_key("stream shards", self.seed, self.planner.images_seen, turn)
            found = False
            for shard in permutation(key, count)[reader::readers].tolist():
                for item in self._shard(shard, bad):
                    found = True
                    yield item
                if len(bad) > self.limit:
                    return
            if not found:
                return

    def _shard(self, number: int, bad: _Bad) -> Iterator[tuple[Sample, str, str]]:
        shard, sample_id = self.manifest.shards[number], int(self.manifest.first_ids[number])
        end = sample_id + shard.samples
        sums = read_checksums(self.directory / shard.name)
        try:
            with (
                open_stream(self.url.replace("{shard}", shard.name)) as stream,
                tarfile.open(fileobj=stream, mode="r|") as tar,
            ):
                for key, members in _grouped(tar):
                    if sample_id == end:
                        raise ValueError(f"more than the manifest's {shard.samples} samples")
                    try:
                        image, label = self._checked(members, sums, sample_id - end)
                        yield Sample(sample_id, image, label), key, shard.name
                    except BadSample as error:
                        bad[sample_id] = BadRecord(sample_id, key, shard.name, str(error))
                        if len(bad) > self.limit:
                            return
                    sample_id += 1
            if sample_id < end:
                raise ValueError(f"{end - sample_id} of {shard.samples} samples did not come")
        except Exception as error:
            at, reason = min(sample_id, end - 1), f"the stream broke: {error}"
            bad.setdefault(at, BadRecord(at, "?", shard.name, reason))

    def _checked(
        self, members: dict[bytes, bytes], sums: np.ndarray | None, at: int
    ) -> tuple[bytes, int]:
        """Image and label of one sample; ``at`` counts from the end of its shard."""
        image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        label = members.get(b"cls")
        if image is None or label is None:
            raise BadSample("it has no .jpg (or .webp) or no .cls")
        if sums is not None and (-at > len(sums) or checksum(image, label) != int(sums[at])):
            raise BadSample("checksum differs from the one recorded")
        return image, parse_label(label, len(self.manifest.classes))


def _grouped(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[bytes, bytes]]]:
    """Neighbours that share a key, in whatever order: (key, content by extension)."""

    def members() -> Iterator[tuple[str, bytes, bytes]]:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                key, _, extension = member.name.rpartition(".")
                yield key, extension.encode(), content.read()

    for key, group in itertools.groupby(members(), key=operator.itemgetter(0)):
        yield key, {extension: data for _, extension, data in group}


@contextlib.contextmanager
def open_stream(url: str) -> Iterator[Any]:
    """What comes from an address fsspec knows, or out of the command after ``pipe:``."""
    if not url.startswith("pipe:"):
        whole = {"block_size": 0} if url.startswith("http") else {}  # one request, no seeking
        with fsspec.open(url, "rb", **whole) as stream:
            yield stream
        return
    with subprocess.Popen(url[5:], shell=True, stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        yield command.stdout
        while command.stdout.read(1 << 20):  # what follows the archive's end
            pass
        if command.wait():
            raise OSError(f"exit status {command.returncode} of {url}")
