"""Carrying out drawn parameters on one picture with PIL: the reference both backends answer to."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from timm.data.auto_augment import NAME_TO_OP

from l2vit.data.draws import NO_OP, OPS
from l2vit.data.shards import BadSample

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WHOLE = {"Posterize", "Solarize", "SolarizeAdd"}
_PLAIN = {"AutoContrast", "Equalize", "Invert"}


def decode(image: bytes) -> Image.Image:
    """The picture as PIL's RGB; a JPEG with any irregularity is refused.

    Three-component JPEGs go through libjpeg-turbo directly, which gives PIL's own pixels in less
    time; others (grey, CMYK) through PIL.

    Raises:
        BadSample: it cannot be decoded, wholly and cleanly.
    """
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(image)
        if colours in ("YCbCr", "Gray"):
            return Image.fromarray(simplejpeg.decode_jpeg(image, colorspace="RGB", strict=True))
        with Image.open(io.BytesIO(image)) as opened:
            return opened.convert("RGB")
    except (ValueError, OSError, SyntaxError, UnidentifiedImageError) as error:
        raise BadSample(f"cannot be decoded ({error})") from None


def crop_resize(
    picture: Image.Image, box: np.ndarray, size: int, interpolation: str
) -> Image.Image:
    """The crop ``box`` (top, left, height, width) resized to ``size`` × ``size``."""
    top, left, height, width = (int(x) for x in box)
    crop = picture.crop((left, top, left + width, top + height))
    return crop.resize((size, size), RESAMPLING[interpolation])


def flip(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


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
