"""Carrying out drawn parameters on one picture on the host, by timm's own functions."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import simplejpeg
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from l2vit.data.draws import NO_OP, OPS
from l2vit.data.shards import JPEG_START, BadSample

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WHOLE = {"Posterize", "Solarize", "SolarizeAdd"}
_PLAIN = {"AutoContrast", "Equalize", "Invert"}


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
    """The crop ``box`` (top, left, height, width) resized to (size, size, 3) uint8."""
    top, left, height, width = box.tolist()
    return resize(picture[top : top + height, left : left + width], (size, size), interpolation)


def resize(picture: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """(h, w, 3) uint8 resized to ``size`` (height, width).

    By PyTorch's antialiased resize of bytes, made after Pillow's: a byte in some two hundred
    differs from Pillow's by one, in a quarter of the time.
    """
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(picture).permute(2, 0, 1)[None],
        size=size,
        mode=interpolation,
        antialias=True,
    )
    return resized[0].permute(1, 2, 0).numpy()


def apply_op(
    picture: Image.Image,
    number: int,
    argument: float,
    *,
    fill: tuple[int, int, int],
    interpolation: str,
) -> Image.Image:
    """One operation of ``OPS`` by timm's own function; ``NO_OP`` gives the picture back."""
    if number == NO_OP:
        return picture
    name = OPS[number]
    if name == "Posterize" and argument < 1:
        return Image.new("RGB", picture.size)  # 0 bits: black; Pillow 13 refuses to do it
    arguments: tuple[float, ...] = (
        () if name in _PLAIN else (int(argument) if name in _WHOLE else argument,)
    )
    operation: Callable[..., Image.Image] = cast(Any, NAME_TO_OP[name])
    return operation(picture, *arguments, fillcolor=fill, resample=RESAMPLING[interpolation])


def apply_ops(
    picture: Image.Image,
    numbers: np.ndarray,
    arguments: np.ndarray,
    *,
    fill: tuple[int, int, int],
    interpolation: str,
) -> Image.Image:
    """Each operation of (layers,) ``numbers`` with its argument, in order."""
    for number, argument in zip(numbers.tolist(), arguments.tolist(), strict=True):
        picture = apply_op(picture, number, argument, fill=fill, interpolation=interpolation)
    return picture
