"""Small pictures for the report, as base64 JPEGs."""

from __future__ import annotations

import base64
import io
import zlib

from PIL import Image, ImageFile, ImageOps

from data_prep.clean import PIL_FORMATS

SIDE = 96
_MOST_PIXELS = 50_000_000
_MOST_BYTES = 16 << 20


def thumbnail(data: bytes, *, square: bool = False) -> str:
    """Base64 JPEG of what can be seen of an image, damaged or not; empty where nothing can.

    Args:
        data: the file, perhaps compressed with gzip.
        square: cut to the middle square; otherwise the whole picture fits into the side.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        if data[:2] == b"\x1f\x8b":
            data = zlib.decompressobj(wbits=31).decompress(data, _MOST_BYTES)
        image = Image.open(io.BytesIO(data), formats=PIL_FORMATS)
        if image.width * image.height > _MOST_PIXELS:
            return ""
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        small = image.convert("RGB")
        if square:
            small = ImageOps.fit(small, (SIDE, SIDE))
        else:
            small.thumbnail((SIDE, SIDE))
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=75)
        return base64.b64encode(stream.getvalue()).decode()
    except Exception:  # anything may be wrong with a refused file; a missing picture is fine
        return ""
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
