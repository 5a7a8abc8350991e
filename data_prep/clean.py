"""One image: decoded strictly once, then passed through, repaired, or refused with a reason.

The strict decode runs at the smallest DCT scale: every entropy-coded bit is still decoded, which
is where damage shows, while most of the inverse transform is saved. The small gray picture that
results feeds the perceptual hash.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from data_prep.options import Rules
from data_prep.records import FORMS

_MAX_SCANS = 200
_DECODED_SIDE = 64  # at 32, equal pictures of other sizes hash up to 10 bits apart; at 64, 2
_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
)


class Refused(Exception):
    """The image is left out. ``reason`` is a word for tables, ``detail`` a line for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class CleanImage:
    """An image fit to be written."""

    data: bytes
    width: int
    """Of the bytes written, pixels."""
    height: int
    form: str
    """Source format, one of FORMS."""
    phash: int
    """Perceptual hash; 0 unless the rules ask for it."""
    repairs: tuple[str, ...] = ()
    """What was wrong; empty where the bytes passed through untouched."""


def clean(data: bytes, rules: Rules) -> CleanImage:
    """Decide about one member's bytes.

    Raises:
        Refused: it cannot be used, and why.
    """
    repairs: list[str] = []
    if not data:
        raise Refused("empty", "zero bytes")
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data, rules.max_bytes)
        repairs.append("gzip")
    form = _form(data)
    if form == "jpeg":
        return _clean_jpeg(data, rules, repairs)
    return _reencode(data, form, rules, [*repairs, form])


def _gunzip(data: bytes, limit: int) -> bytes:
    engine = zlib.decompressobj(wbits=31)
    try:
        result = engine.decompress(data, limit)
    except zlib.error as error:
        raise Refused("corrupt", f"gzip member: {error}") from None
    if engine.unconsumed_tail:
        raise Refused("too-many-bytes", f"unpacks to more than {limit} bytes")
    if not engine.eof:
        raise Refused("truncated", "gzip member ends early")
    return result


def _form(data: bytes) -> str:
    for magic, form in _MAGIC:
        if data.startswith(magic):
            return form
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script")):
        raise Refused("html", "a web page saved under an image's name")
    raise Refused("unrecognised", f"starts with {data[:8].hex()}")


@dataclass
class _Header:
    sof: int = 0
    precision: int = 8
    width: int = 0
    height: int = 0
    components: int = 0
    ids: bytes = b""
    adobe: int = -1
    orientation: int = 1
    faults: list[str] = field(default_factory=list)


def _jpeg_header(data: bytes) -> _Header:
    """Walk the marker segments up to the first scan."""
    head, place = _Header(), 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            break
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if marker == 0xDA:
            return head
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and not head.sof:
            _frame(head, marker, body)
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            head.adobe = body[11]
        elif marker == 0xE1 and body[:6] == b"Exif\x00\x00":
            head.orientation = _orientation(body[6:])
        place += 2 + length
    raise Refused("corrupt", "no image data after the JPEG header")


def _frame(head: _Header, marker: int, body: bytes) -> None:
    if len(body) < 6:
        raise Refused("corrupt", "JPEG frame header cut short")
    head.sof = marker
    head.precision, head.height, head.width, head.components = struct.unpack(">BHHB", body[:6])
    head.ids = body[6::3][: head.components]


def _orientation(tiff: bytes) -> int:
    """EXIF orientation (1 … 8) from the first directory; 1 where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    start = struct.unpack(order + "I", tiff[4:8])[0]
    if start + 2 > len(tiff):
        return 1
    for index in range(struct.unpack(order + "H", tiff[start : start + 2])[0]):
        entry = tiff[start + 2 + 12 * index : start + 14 + 12 * index]
        if len(entry) < 12:
            break
        tag, _, _, value = struct.unpack(order + "HHIH2x", entry)
        if tag == 0x0112:
            return value if 1 <= value <= 8 else 1
    return 1


def _clean_jpeg(data: bytes, rules: Rules, repairs: list[str]) -> CleanImage:
    head = _jpeg_header(data)
    _check_size(head.width, head.height, rules)
    if head.sof == 0xC2 and data.count(b"\xff\xda") > _MAX_SCANS:
        raise Refused("too-many-scans", f"more than {_MAX_SCANS} scans")
    repairs += _jpeg_faults(head, rules)
    small = _strict_decode(data, head, rules, repairs)
    if b"\xff\xd9" not in data[-64:]:
        # Readers that look for the end marker where a file ends would call this one cut off.
        data = data[: data.rfind(b"\xff\xd9") + 2]
        repairs.append("trailing-bytes")
    if set(repairs) - {"gzip", "trailing-bytes"} or rules.format != "jpeg":
        return _reencode(data, "jpeg", rules, repairs)
    return CleanImage(data, head.width, head.height, "jpeg", _hash(small, rules), tuple(repairs))


def _jpeg_faults(head: _Header, rules: Rules) -> list[str]:
    """Why bytes that decode may still not be passed through: some reader would see them wrongly."""
    faults = []
    if head.sof not in (0xC0, 0xC1, 0xC2) or head.precision != 8:
        faults.append("unusual-coding")
    if head.components == 4:
        faults.append("ycck" if head.adobe == 2 else "cmyk")
    elif head.components not in (1, 3):
        faults.append("unusual-components")
    elif head.components == 3 and (head.adobe == 0 or head.ids == b"RGB"):
        faults.append("rgb-jpeg")
    if head.orientation != 1 and rules.exif == "apply":
        faults.append("exif-rotation")
    if 0 < rules.max_short_side < min(head.width, head.height):
        faults.append("resized")
    return faults


def _strict_decode(data: bytes, head: _Header, rules: Rules, repairs: list[str]) -> np.ndarray:
    """(h, w) uint8 gray, reduced up to eightfold.

    Raises:
        Refused: libjpeg reported an error or a warning.
    """
    space = "CMYK" if head.components == 4 else "GRAY"
    side = min(_DECODED_SIDE if rules.perceptual else 1, head.width, head.height)
    try:
        return simplejpeg.decode_jpeg(data, space, min_height=side, min_width=side)[:, :, 0]
    except ValueError as error:
        text = str(error)
        if "subsampling" in text.lower():
            repairs.append("unusual-sampling")
            return np.zeros((1, 1), np.uint8)
        reason = "truncated" if "remature end" in text else "corrupt"
        raise Refused(reason, text.strip()) from None


def _check_size(width: int, height: int, rules: Rules) -> None:
    if width * height > rules.max_pixels:
        raise Refused("too-many-pixels", f"{width}x{height} is above {rules.max_pixels} pixels")
    if min(width, height) < max(1, rules.min_side):
        raise Refused("too-small", f"{width}x{height}: a side is under {rules.min_side}")


def _reencode(data: bytes, form: str, rules: Rules, repairs: list[str]) -> CleanImage:
    """Decode with PIL, bring to plain upright 8-bit RGB, and encode anew."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(
                io.BytesIO(data), formats=[*(f.upper() for f in FORMS), "MPO"]
            )
            _check_size(*image.size, rules)
            image.load()
            image = _upright_rgb(image, rules, repairs)
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused("too-many-pixels", str(error)) from None
    except MemoryError:
        raise Refused("too-many-pixels", "does not fit in memory") from None
    except Exception as error:  # PIL's plug-ins raise many kinds on damaged files
        text = f"{type(error).__name__}: {error}"
        raise Refused("truncated" if "truncated" in text else "corrupt", text) from None
    short = min(image.size)
    if 0 < rules.max_short_side < short:
        scale = rules.max_short_side / short
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        if "resized" not in repairs:
            repairs.append("resized")
    return CleanImage(
        _encode(image, form, rules),
        image.width,
        image.height,
        form,
        _hash(np.asarray(image.convert("L")), rules),
        tuple(repairs),
    )


def _upright_rgb(image: Image.Image, rules: Rules, repairs: list[str]) -> Image.Image:
    if rules.exif == "apply" and image.getexif().get(0x0112, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        if "exif-rotation" not in repairs:
            repairs.append("exif-rotation")
    if image.mode.startswith("I"):
        repairs.append("16-bit")
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255:
            values = values >> 8
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise Refused("unsupported", "floating-point pixels have no agreed range")
    if image.mode == "P":
        repairs.append("palette")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        repairs.append("alpha")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _encode(image: Image.Image, form: str, rules: Rules) -> bytes:
    stream = io.BytesIO()
    if rules.format == "webp":
        image.save(stream, "WEBP", quality=rules.quality, method=4)
    else:
        # Graphics keep their coloured edges; photographs were subsampled already.
        sampling = "4:2:0" if form == "jpeg" else "4:4:4"
        image.save(stream, "JPEG", quality=rules.quality, subsampling=sampling)
    return stream.getvalue()


_BITS = (np.uint64(1) << np.arange(64, dtype=np.uint64)).reshape(8, 8)


@functools.lru_cache(1024)
def _cosines(length: int) -> np.ndarray:
    """(8, length) float32: the eight lowest DCT-II waves over ``length`` pixels."""
    place = np.arange(length) + 0.5
    waves = np.cos(np.pi / length * np.outer(np.arange(8), place)) / length
    return waves.astype(np.float32)


def _hash(gray: np.ndarray, rules: Rules) -> int:
    return perceptual_hash(gray) if rules.perceptual else 0


def perceptual_hash(gray: np.ndarray) -> int:
    """64-bit DCT hash: which of the picture's 8×8 lowest frequencies lie above their median.

    Args:
        gray: (h, w) uint8.
    """
    low = _cosines(gray.shape[0]) @ gray.astype(np.float32) @ _cosines(gray.shape[1]).T
    ranked = np.sort(low, axis=None)
    return int(_BITS[low > (ranked[31] + ranked[32]) / 2].sum(dtype=np.uint64))
