"""The ``dali`` backend: decoding, cropping, resizing and flipping by one graph, on GPU or CPU.

The only file that imports nvidia.dali. We decide everything (which bytes, which box, whether to
flip) and hand it over with the bytes; the graph only carries it out, so it has no state worth
saving. Operations on pixels that must equal timm's come after the graph.
"""

from __future__ import annotations

import importlib
import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import torch

from l2vit.data import augment_device, pil
from l2vit.data.augment import NO_OP, AugmentParams, AugmentSampler, fill_colour
from l2vit.data.bad_samples import BadSampleLog, NoBadSamples
from l2vit.data.batch import DecodedBatch, EvalPlanner, TrainPlanner, read_batch
from l2vit.data.config import AugmentConfig
from l2vit.data.shards import BadSample, Sample, ShardReader, image_size
from l2vit.errors import UserError

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline


class GraphInputs(NamedTuple):
    """What the graph takes of a batch of n pictures."""

    files: list[np.ndarray]
    """Encoded images, uint8."""
    corners: np.ndarray
    """(n, 2) int32: top, left of the part to decode."""
    shapes: np.ndarray
    """(n, 2) int32: height, width of that part."""
    sizes: np.ndarray
    """(n, 2) float32: height, width to resize it to."""
    windows: np.ndarray
    """(n, 2) int32: top, left of the S × S part of the result that is kept."""
    flips: np.ndarray
    """(n,) int32."""

    def of(self, places: np.ndarray) -> GraphInputs:
        """The inputs of some of the pictures."""
        return GraphInputs([self.files[i] for i in places], *(part[places] for part in self[1:]))


class Source(Protocol):
    """Makes batches, their pixels missing, of samples that pass ``check`` (raises BadSample)."""

    def __call__(
        self, number: int, *, check: Callable[[Sample], None]
    ) -> tuple[DecodedBatch, GraphInputs, AugmentParams | None]: ...


@dataclass
class TrainSource:
    """Training micro-batches for the graph."""

    reader: ShardReader
    planner: TrainPlanner
    sampler: AugmentSampler
    log: BadSampleLog
    ahead: int
    """Batches whose bytes the system is asked for ahead of time."""

    def __call__(
        self, number: int, *, check: Callable[[Sample], None]
    ) -> tuple[DecodedBatch, GraphInputs, AugmentParams | None]:
        ahead = self.reader.ahead or self.ahead
        first = number + ahead if number else 1
        for upcoming in range(first, number + ahead + 1):
            self.reader.announce(self.planner.plan(upcoming).ids)
        batch, encoded = read_batch(
            self.reader,
            self.planner.plan(number),
            lambda sample: _checked(sample, check),
            following=self.planner.order.following,
            limit=self.log.limit,
        )
        self.log.record(batch.bad, complete=batch.complete)
        params = self.sampler.sample(batch.plan.epoch, batch.plan.ids)
        batch.draw_erasing(params, draws=self.sampler.draws)
        boxes = self.sampler.boxes(params, np.array([size for _, size in encoded]))
        side = self.sampler.input_size
        inputs = _inputs(encoded, boxes, np.full_like(boxes[:, 2:], side), side, params.flip)
        return batch, inputs, params


@dataclass
class EvalSource:
    """Evaluation batches for the graph: what timm's evaluation transform does."""

    reader: ShardReader
    planner: EvalPlanner
    input_size: int
    crop_fraction: float
    crop_mode: str
    log: NoBadSamples

    def __call__(
        self, number: int, *, check: Callable[[Sample], None]
    ) -> tuple[DecodedBatch, GraphInputs, AugmentParams | None]:
        batch, encoded = read_batch(
            self.reader,
            self.planner.plan(number),
            lambda sample: _checked(sample, check),
            following=lambda sample_id: sample_id,
            limit=0,
        )
        self.log.record(batch.bad, complete=batch.complete)
        sizes = np.array([size for _, size in encoded])
        whole = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        resized = eval_sizes(sizes, self.input_size, self.crop_fraction, self.crop_mode)
        flips = np.zeros(len(sizes), bool)
        return batch, _inputs(encoded, whole, resized, self.input_size, flips), None


def _checked(sample: Sample, check: Callable[[Sample], None]) -> tuple[np.ndarray, tuple[int, int]]:
    """The file of a sample and its height and width."""
    check(sample)
    return np.frombuffer(sample.image, np.uint8), image_size(sample.image)


def _inputs(
    encoded: list[tuple[np.ndarray, tuple[int, int]]],
    boxes: np.ndarray,
    sizes: np.ndarray,
    side: int,
    flips: np.ndarray,
) -> GraphInputs:
    """``boxes`` (n, 4) of the files resized to ``sizes`` (n, 2), the middle kept."""
    return GraphInputs(
        [file for file, _ in encoded],
        boxes[:, :2].astype(np.int32),
        boxes[:, 2:].astype(np.int32),
        sizes.astype(np.float32),
        np.rint((sizes - side) / 2).astype(np.int32),
        flips.astype(np.int32),
    )


def eval_sizes(
    sizes: np.ndarray, input_size: int, crop_fraction: float, crop_mode: str
) -> np.ndarray:
    """What images of ``sizes`` (n, 2: height, width) are resized to before the central crop.

    ``center``: the short side becomes ⌊input_size / crop_fraction⌋ and the ratio is kept;
    ``squash``: both sides do.
    """
    side = math.floor(input_size / crop_fraction)
    if crop_mode == "squash":
        return np.full_like(sizes, side)
    short = sizes.min(axis=1, keepdims=True)
    return np.where(sizes == short, side, (side * sizes / short).astype(np.int64))


def build_graph(
    source: Callable[[], GraphInputs],
    *,
    batch: int,
    input_size: int,
    interpolation: str,
    threads: int,
    prefetch: int,
    gpu: bool,
    device_id: int | None,
    hw_decoder_load: float = 0.65,
    region: bool = True,
) -> Pipeline:
    """The graph, for the CPU or a GPU.

    Args:
        source: gives the inputs of a batch.
        batch: most images in a batch.
        input_size: side S of what comes out, pixels.
        interpolation: ``bicubic`` or ``bilinear``, antialiased as PIL's is.
        threads: CPU threads of DALI.
        prefetch: batches under way in the graph.
        gpu: decode on the GPU (``mixed``), where later operators follow.
        device_id: CUDA device. None for the CPU; a GPU graph without one can be checked
            (``serialize()``) where there is no driver, not built.
        hw_decoder_load: share of the JPEGs for the hardware decoder of GPUs that have one.
        region: decode only the part that is wanted; False decodes the whole and cuts it out.
    """
    from nvidia import dali

    library: Any = dali  # its annotations lack what is made at run time
    fn, types = library.fn, library.types
    kinds = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
    mixed: dict[str, Any] = {"device": "mixed", "hw_decoder_load": hw_decoder_load}

    @library.pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    def graph() -> Any:
        files, corners, shapes, sizes, windows, flips = fn.external_source(
            source=source,
            num_outputs=6,
            batch=True,
            dtype=[types.UINT8, *[types.INT32] * 2, types.FLOAT, *[types.INT32] * 2],
            ndim=[1, 1, 1, 1, 1, 0],
        )
        decoding: dict[str, Any] = {
            "output_type": types.RGB,
            "adjust_orientation": False,  # timm ignores EXIF, DALI would turn the picture
            "jpeg_fancy_upsampling": True,
            **(mixed if gpu else {}),
        }
        if region:
            pictures = fn.decoders.image_slice(
                files,
                corners,
                shapes,
                axes=[0, 1],
                normalized_anchor=False,
                normalized_shape=False,
                **decoding,
            )
        else:
            pictures = fn.decoders.image(files, **decoding)
            pictures = fn.slice(pictures, start=corners, shape=shapes, axes=[0, 1])
        kind, window = kinds[interpolation], [input_size, input_size]
        pictures = fn.resize(pictures, size=sizes, interp_type=kind, antialias=True)
        pictures = fn.slice(pictures, start=windows, shape=window, axes=[0, 1])
        return fn.flip(pictures, horizontal=flips)

    return cast("Pipeline", graph())


class DaliBatches:
    """Batches 0, 1, … of ``source`` in order, with their pixels, on the device.

    A batch that DALI cannot decode (a damaged file that looked whole) is made again with every
    image checked by a strict decoder first, so that the source can replace the culprit. If none
    is found so, DALI itself is tried on each, and refuses what it alone cannot decode.

    Args:
        source: makes batches without pixels.
        count: batches of one iteration; None for without end.
        prefetch: batches under way in the graph.
        augment: of training; its operations follow the graph.
        graph: the other arguments of ``build_graph``.
    """

    def __init__(
        self,
        source: Source,
        *,
        count: int | None = None,
        prefetch: int,
        augment: AugmentConfig | None = None,
        **graph: Any,
    ) -> None:
        # Here, not in the thread that works ahead: its exit handler must run after that thread's.
        importlib.import_module("nvidia.dali")
        self._source, self._count = source, count
        self._prefetch, self._augment, self._graph = prefetch, augment, graph
        self._pipeline: Pipeline | None = None
        self._under_way: deque[tuple[DecodedBatch, GraphInputs, AugmentParams | None]] = deque()
        self._next = 0
        self._strict_until = 0
        self._refused: set[int] = set()
        self._failure: BaseException | None = None

    def __iter__(self) -> Generator[DecodedBatch, None, None]:
        upcoming = self._under_way[0][0].plan.number if self._under_way else self._next
        if upcoming % self._count if self._count else upcoming:
            self._restart(0)  # an earlier iteration was left before its end
        done = 0
        while self._count is None or done < self._count:
            yield self._one(done)
            done += 1

    def close(self) -> None:
        """Stop the graph's threads."""
        self._restart(0)

    def _restart(self, number: int) -> None:
        self._pipeline = None
        self._under_way.clear()
        self._next = number

    def _one(self, number: int) -> DecodedBatch:
        remedies = [self._decode_strictly, self._try_each]
        while True:
            try:
                return self._run()
            except RuntimeError as error:
                self._raise_failure()
                if not remedies or not remedies.pop(0)():
                    raise UserError(f"DALI cannot make batch {number}: {error}") from error
            self._restart(number)

    def _decode_strictly(self) -> bool:
        self._strict_until = self._next  # every image that was under way
        return True

    def _try_each(self) -> bool:
        found: set[int] = set()
        count = 0
        for batch, inputs, _ in self._under_way:
            count += len(batch.ids)
            found |= self._undecodable(batch.ids, inputs, np.arange(len(batch.ids)))
        if len(found) == count:
            return False  # no fault of the pictures: no memory, a broken device
        self._refused |= found
        return bool(found)

    def _undecodable(self, ids: np.ndarray, inputs: GraphInputs, places: np.ndarray) -> set[int]:
        """Sample ids of those at ``places`` that DALI cannot decode, found by halving."""
        part = inputs.of(places)
        try:
            pipeline = build_graph(lambda: part, prefetch=1, **self._graph)
            pipeline.build()
            pipeline.run()
        except RuntimeError:
            if len(places) == 1:
                return set(ids[places].tolist())
            first, second = np.array_split(places, 2)
            return self._undecodable(ids, inputs, first) | self._undecodable(ids, inputs, second)
        return set()

    def _check(self, sample: Sample) -> None:
        if sample.id in self._refused:
            raise BadSample("DALI cannot decode it")
        if self._next < self._strict_until:
            pil.decode(sample.image)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> DecodedBatch:
        if self._pipeline is None:
            self._pipeline = build_graph(self._feed, prefetch=self._prefetch, **self._graph)
            self._pipeline.build()
        (pictures,) = self._pipeline.run()
        batch, _, params = self._under_way.popleft()
        pixels = torch.from_dlpack(pictures.as_tensor()).clone()
        if pixels.is_cuda:
            # DALI takes its memory back on a stream of its own, which waits for none of torch's
            torch.cuda.current_stream(pixels.device).synchronize()
        pixels = pixels[: len(batch.ids)]
        batch.pixels = pixels if params is None else self._augmented(pixels, params)
        return batch

    def _augmented(self, pixels: torch.Tensor, params: AugmentParams) -> torch.Tensor:
        if self._augment is None or not (params.ops != NO_OP).any():
            return pixels
        return augment_device.apply_ops(
            pixels,
            params.ops,
            params.arguments,
            fill=fill_colour(self._augment),
            interpolation=self._augment.interpolation,
        )

    def _feed(self) -> GraphInputs:
        number = self._next
        if self._count is not None:
            number %= self._count  # already the next iteration's
        try:
            made = self._source(number, check=self._check)
        except BaseException as error:
            self._failure = error  # DALI would wrap it and lose its type
            raise
        self._next += 1
        self._under_way.append(made)
        return made[1]
