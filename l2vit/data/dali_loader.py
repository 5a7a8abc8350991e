"""The DALI backend: decoding, cropping, resizing and flipping, on the GPU or the CPU.

The only file that imports nvidia.dali. The host decides everything (which bytes, which box,
whether to flip) and hands it over with the bytes; the graph only carries it out, so it has no
state worth saving. On the CPU it ends at the decoded crops: DALI's antialiased resize there takes
many times as long as PyTorch's, which the host backend uses too. Operations on pixels that must
equal timm's come after the graph.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch

from l2vit.data import host_ops
from l2vit.data.plan import Work
from l2vit.data.shards import BadSample, Sample
from l2vit.errors import UserError

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline


@dataclass
class Feed:
    """One batch on its way into the graph."""

    work: Work
    ids: np.ndarray
    """(n,) sample ids of the images."""
    labels: np.ndarray
    """(n,) int64, theirs."""
    images: list[bytes]
    boxes: np.ndarray
    """(n, 4): top, left, height, width of the part to decode."""
    sizes: np.ndarray
    """(n, 2): height, width to resize that part to."""
    windows: np.ndarray
    """(n, 2): top, left of the S × S part of the result that is kept."""
    flip: np.ndarray
    """(n,) bool."""
    extra: Any = None
    """Whatever else the caller wants back with the pixels."""


class FeedMaker(Protocol):
    """Makes feeds of samples that pass ``check``, which raises BadSample."""

    def __call__(self, number: int, *, check: Callable[[Sample], None]) -> Feed: ...


def build_graph(
    source: Callable[[], tuple[Any, ...]],
    *,
    batch: int,
    input_size: int,
    interpolation: str,
    threads: int,
    prefetch: int,
    gpu: bool,
    device_id: int | None,
    hw_decoder_load: float = 0.65,
    whole: bool | None = None,
) -> Pipeline:
    """The graph, for the CPU or a GPU.

    Args:
        source: gives a batch: images, anchors, shapes, and for a whole graph sizes, windows, flips.
        batch: most images in a batch.
        input_size: side S of what comes out, pixels.
        interpolation: ``bicubic`` or ``bilinear``, antialiased as PIL's is.
        threads: CPU threads of DALI.
        prefetch: batches under way in the graph.
        gpu: decode on the GPU (``mixed``), where later operators follow.
        device_id: CUDA device. None for the CPU; a GPU graph without one can be checked
            (``serialize()``) where there is no driver, not built.
        hw_decoder_load: share of the JPEGs for the hardware decoder of GPUs that have one.
        whole: resize, window and flip too; else the graph gives the decoded crops, each of its own
            size. None for what is better: whole on a GPU, not on the CPU.
    """
    from nvidia import dali

    whole = gpu if whole is None else whole

    library: Any = dali  # its annotations lack what is made at run time
    fn, types = library.fn, library.types
    kinds = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
    mixed: dict[str, Any] = {"device": "mixed", "hw_decoder_load": hw_decoder_load}
    outputs = 6 if whole else 3

    @library.pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    def graph() -> Any:
        images, anchors, shapes, *rest = fn.external_source(
            source=source,
            num_outputs=outputs,
            batch=True,
            dtype=[types.UINT8, *[types.INT32] * 2, types.FLOAT, *[types.INT32] * 2][:outputs],
            ndim=[1, 1, 1, 1, 1, 0][:outputs],
        )
        pictures = fn.decoders.image_slice(
            images,
            anchors,
            shapes,
            axes=[0, 1],
            normalized_anchor=False,
            normalized_shape=False,
            output_type=types.RGB,
            adjust_orientation=False,  # timm ignores EXIF, DALI would turn the picture
            jpeg_fancy_upsampling=True,
            **(mixed if gpu else {}),
        )
        if not whole:
            return pictures
        sizes, windows, flips = rest
        kind, window = kinds[interpolation], [input_size, input_size]
        pictures = fn.resize(pictures, size=sizes, interp_type=kind, antialias=True)
        pictures = fn.slice(pictures, start=windows, shape=window, axes=[0, 1])
        return fn.flip(pictures, horizontal=flips)

    return cast("Pipeline", graph())


class DaliBatches:
    """Pixels of feeds 0, 1, … in order: pairs (feed, (n, S, S, 3) uint8 on the device).

    A batch that DALI cannot decode (a damaged file that looked whole) is made again with every
    image checked by a strict decoder first, so that the maker can replace the culprit. If none is
    found so, DALI itself is asked for each, and refuses what it alone cannot decode.
    """

    def __init__(
        self, make: FeedMaker, *, count: int | None = None, prefetch: int, **graph: Any
    ) -> None:
        # Here, not in the thread that works ahead: its exit handler must run after that thread's.
        importlib.import_module("nvidia.dali")
        self._make, self._count = make, count
        self._prefetch, self._graph = prefetch, graph
        self._fitter: _Fitter | None = None
        if not graph["gpu"]:
            self._fitter = _Fitter(graph["input_size"], graph["interpolation"], graph["threads"])
        self._pipeline: Pipeline | None = None
        self._under_way: deque[Feed] = deque()
        self._next = 0
        self._strict_until = 0
        self._refused: set[int] = set()
        self._failure: BaseException | None = None

    def __iter__(self) -> Iterator[tuple[Feed, torch.Tensor]]:
        upcoming = self._under_way[0].work.number if self._under_way else self._next
        if upcoming % self._count if self._count else upcoming:
            self._restart(0)  # an earlier iteration was left before its end
        done = 0
        while self._count is None or done < self._count:
            yield self._one(done)
            done += 1

    def _restart(self, number: int) -> None:
        self._pipeline = None
        self._under_way.clear()
        self._next = number

    def _one(self, number: int) -> tuple[Feed, torch.Tensor]:
        remedies = [self._be_strict, self._ask_dali]
        while True:
            try:
                return self._run()
            except RuntimeError as error:
                self._raise_failure()
                if not remedies or not remedies.pop(0)():
                    raise UserError(f"DALI cannot make batch {number}: {error}") from error
            self._restart(number)

    def _be_strict(self) -> bool:
        self._strict_until = self._next  # every image that was under way
        return True

    def _ask_dali(self) -> bool:
        found: set[int] = set()
        for feed in self._under_way:
            found |= self._undecodable(feed, np.arange(len(feed.images)))
        if len(found) == sum(len(feed.images) for feed in self._under_way):
            return False  # no fault of the pictures: no memory, a broken device
        self._refused |= found
        return bool(found)

    def _undecodable(self, feed: Feed, places: np.ndarray) -> set[int]:
        """Sample ids of those at ``places`` that DALI cannot decode, found by halving."""
        images = [np.frombuffer(feed.images[place], np.uint8) for place in places]
        given = (images, *np.hsplit(feed.boxes[places].astype(np.int32), 2))
        try:
            pipeline = build_graph(lambda: given, prefetch=1, **{**self._graph, "whole": False})
            pipeline.build()
            pipeline.run()
        except RuntimeError:
            if len(places) == 1:
                return set(feed.ids[places].tolist())
            halves = np.array_split(places, 2)
            return self._undecodable(feed, halves[0]) | self._undecodable(feed, halves[1])
        return set()

    def _check(self, sample: Sample) -> None:
        if sample.id in self._refused:
            raise BadSample("DALI cannot decode it")
        if self._next < self._strict_until:
            host_ops.decode(sample.image)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> tuple[Feed, torch.Tensor]:
        if self._pipeline is None:
            self._pipeline = build_graph(self._source, prefetch=self._prefetch, **self._graph)
            self._pipeline.build()
        (pictures,) = self._pipeline.run()
        feed = self._under_way.popleft()
        if self._fitter is not None:
            return feed, self._fitter(pictures, feed)
        pixels = torch.from_dlpack(pictures.as_tensor()).clone()
        # DALI takes its memory back on a stream of its own, which waits for none of torch's
        torch.cuda.current_stream(pixels.device).synchronize()
        return feed, pixels[: len(feed.images)]

    def _source(self) -> tuple[Any, ...]:
        number = self._next
        if self._count is not None:
            number %= self._count  # already the next iteration's
        try:
            feed = self._make(number, check=self._check)
        except BaseException as error:
            self._failure = error  # DALI would wrap it and lose its type
            raise
        self._next += 1
        self._under_way.append(feed)
        given = (
            [np.frombuffer(image, np.uint8) for image in feed.images],
            feed.boxes[:, :2].astype(np.int32),
            feed.boxes[:, 2:].astype(np.int32),
        )
        if self._fitter is not None:
            return given
        return (
            *given,
            feed.sizes.astype(np.float32),
            feed.windows.astype(np.int32),
            feed.flip.astype(np.int32),
        )

    def close(self) -> None:
        """Stop the graph's threads."""
        self._restart(0)
        if self._fitter is not None:
            self._fitter.close()


class _Fitter:
    """The rest of the graph on the CPU: resize, window and flip, in threads."""

    def __init__(self, input_size: int, interpolation: str, threads: int) -> None:
        self._size, self._interpolation = input_size, interpolation
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "fit")

    def __call__(self, pictures: Any, feed: Feed) -> torch.Tensor:
        """(n, S, S, 3) uint8 of the decoded crops of ``feed``."""
        count = len(feed.images)
        pixels = np.empty((count, self._size, self._size, 3), np.uint8)

        def fit(first: int) -> None:
            for i in range(first, count, self._threads):
                pixels[i] = self._one(np.asarray(pictures[i]), feed, i)

        list(self._pool.map(fit, range(self._threads)))
        return torch.from_numpy(pixels)

    def _one(self, crop: np.ndarray, feed: Feed, i: int) -> np.ndarray:
        height, width = feed.sizes[i].tolist()
        top, left = feed.windows[i].tolist()
        resized = host_ops.resize(crop, (height, width), self._interpolation)
        kept = resized[top : top + self._size, left : left + self._size]
        return kept[:, ::-1] if feed.flip[i] else kept

    def close(self) -> None:
        self._pool.shutdown()
