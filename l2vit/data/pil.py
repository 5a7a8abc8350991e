"""The ``pil`` backend: libjpeg-turbo, PyTorch's resize and timm's functions on PIL pictures.

It runs in worker processes and is the reference: what continues an old run to the bit.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import simplejpeg
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP
from timm.data.transforms_factory import transforms_imagenet_eval

from l2vit.data.augment import NO_OP, OPS, AugmentSampler, fill_colour
from l2vit.data.batch import DecodedBatch, EvalPlanner, TrainPlanner, read_batch
from l2vit.data.shards import JPEG_START, BadSample, ShardReader

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_TAKES_INTEGER = {"Posterize", "Solarize", "SolarizeAdd"}
_TAKES_NOTHING = {"AutoContrast", "Equalize", "Invert"}


@dataclass
class PilTrainSet(torch.utils.data.Dataset[DecodedBatch]):
    """Training micro-batches by number; what a worker process runs."""

    reader: ShardReader
    planner: TrainPlanner
    sampler: AugmentSampler
    limit: int
    """Bad samples of one batch after which to give up."""
    _announced: int = 0

    def __getitem__(self, number: int) -> DecodedBatch:
        if self.reader.ahead:
            upcoming = range(max(self._announced, number), number + self.reader.ahead + 1)
            self._announced = upcoming.stop
            for later in upcoming:
                self.reader.announce(self.planner.plan(later).ids)
        batch, pictures = read_batch(
            self.reader,
            self.planner.plan(number),
            lambda sample: decode(sample.image),
            following=self.planner.order.following,
            limit=self.limit,
        )
        ids = batch.plan.ids[: len(pictures)]  # a replaced sample keeps the augmentation
        return augmented(batch, pictures, ids, self.sampler)


class PilEvalSet(torch.utils.data.Dataset[DecodedBatch]):
    """Evaluation batches by number, through timm's own evaluation transform."""

    def __init__(
        self,
        reader: ShardReader,
        planner: EvalPlanner,
        *,
        input_size: int,
        crop_fraction: float,
        crop_mode: str,
    ) -> None:
        self._reader, self._planner, self._size = reader, planner, input_size
        self._transform = transforms_imagenet_eval(
            input_size,
            crop_pct=crop_fraction,
            crop_mode=crop_mode,
            interpolation="bicubic",
            use_prefetcher=True,  # bytes; normalised with the batch
        )

    def __getitem__(self, number: int) -> DecodedBatch:
        batch, pictures = read_batch(
            self._reader,
            self._planner.plan(number),
            lambda sample: decode(sample.image),
            following=lambda sample_id: sample_id,
            limit=0,
        )
        pixels = torch.empty((len(pictures), self._size, self._size, 3), dtype=torch.uint8)
        for place, picture in enumerate(pictures):
            pixels[place] = self._transform(Image.fromarray(picture)).permute(1, 2, 0)
        batch.pixels = pixels
        return batch


def augmented(
    batch: DecodedBatch, pictures: list[np.ndarray], ids: np.ndarray, sampler: AugmentSampler
) -> DecodedBatch:
    """``batch`` with ``pictures`` cropped, resized, flipped and changed as drawn for ``ids``."""
    augment, size = sampler.augment, sampler.input_size
    params = sampler.sample(batch.plan.epoch, ids)
    boxes = sampler.boxes(
        params, np.array([picture.shape[:2] for picture in pictures]).reshape(-1, 2)
    )
    pixels = np.empty((len(pictures), size, size, 3), np.uint8)
    for i, picture in enumerate(pictures):
        picture = crop_resize(picture, boxes[i], size, augment.interpolation)
        pixels[i] = picture[:, ::-1] if params.flip[i] else picture
    batch.pixels = apply_ops(
        torch.from_numpy(pixels),
        params.ops,
        params.arguments,
        fill=fill_colour(augment),
        interpolation=augment.interpolation,
    )
    batch.draw_erasing(params, draws=sampler.draws)
    return batch


def decode(image: bytes) -> np.ndarray:
    """The picture as (height, width, 3) uint8; a file with any irregularity is refused.

    Ordinary JPEGs go through libjpeg-turbo directly, which gives PIL's own pixels in less time;
    anything else (CMYK, WebP) through PIL.

    Raises:
        BadSample: it cannot be decoded, wholly and cleanly.
    """
    try:
        if image.startswith(JPEG_START):
            _, _, colours, _ = simplejpeg.decode_jpeg_header(image)
            if colours in ("YCbCr", "Gray", "RGB"):
                return simplejpeg.decode_jpeg(image, colorspace="RGB", strict=True)
            # PIL overlooks what libjpeg warns of: ask first, at an eighth of the size
            simplejpeg.decode_jpeg(image, "CMYK", min_height=1, min_width=1, strict=True)
        with Image.open(io.BytesIO(image)) as opened:
            return np.array(opened.convert("RGB"))  # writable, as PyTorch wants it
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample(f"cannot be decoded ({error})") from None


def crop_resize(picture: np.ndarray, box: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """The crop ``box`` (top, left, height, width) resized to (size, size, 3) uint8.

    By PyTorch's antialiased resize of bytes, made after Pillow's: a byte in some two hundred
    differs from Pillow's by one, in a quarter of the time.
    """
    top, left, height, width = box.tolist()
    crop = picture[top : top + height, left : left + width]
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(crop).permute(2, 0, 1)[None],
        size=(size, size),
        mode=interpolation,
        antialias=True,
    )
    return resized[0].permute(1, 2, 0).numpy()


def apply_ops(
    pixels: torch.Tensor,
    ops: np.ndarray,
    arguments: np.ndarray,
    *,
    fill: tuple[int, int, int],
    interpolation: str,
) -> torch.Tensor:
    """``augment_gpu.apply_ops`` for pictures on the CPU: by timm's functions, one by one."""
    for i in np.flatnonzero((ops != NO_OP).any(axis=1)).tolist():
        picture = Image.fromarray(pixels[i].numpy())
        for number, argument in zip(ops[i].tolist(), arguments[i].tolist(), strict=True):
            picture = _apply_op(picture, number, argument, fill, interpolation)
        pixels[i] = torch.from_numpy(np.array(picture))
    return pixels


def _apply_op(
    picture: Image.Image,
    number: int,
    argument: float,
    fill: tuple[int, int, int],
    interpolation: str,
) -> Image.Image:
    if number == NO_OP:
        return picture
    name = OPS[number]
    if name == "Posterize" and argument < 1:
        return Image.new("RGB", picture.size)  # 0 bits: black; Pillow 13 refuses to do it
    arguments: tuple[float, ...] = (int(argument) if name in _TAKES_INTEGER else argument,)
    if name in _TAKES_NOTHING:
        arguments = ()
    operation: Callable[..., Image.Image] = cast(Any, NAME_TO_OP[name])
    return operation(picture, *arguments, fillcolor=fill, resample=RESAMPLING[interpolation])
