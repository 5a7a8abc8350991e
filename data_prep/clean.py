"""One image: decoded strictly once, then passed through, repaired, or refused with a reason.

The strict decode runs at the smallest DCT scale: every entropy-coded bit is still decoded, which
is where damage shows, while most of the inverse transform is saved. The small gray picture that
results feeds the perceptual hash.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, features

from data_prep.options import Rules
from data_prep.records import FORMS

BYTES_PER_PIXEL = 12
"""Memory a worker may use for a picture, for each pixel of ``Rules.max_pixels``."""
_COSTLY = {"webp": 20, "avif": 20}  # bytes a pixel of decoders that keep several whole canvases
_MAX_SCANS = 200
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_DECODED_SIDE = 64  # at 32, equal pictures of other sizes hash up to 10 bits apart; at 64, 2
_STRIP = 1 << 20  # pixels converted at a time
_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
)
PIL_FORMATS = [
    *(f.upper() for f in FORMS if f != "avif" or features.check("avif")),
    "MPO",
]
"""What PIL may be asked to open; of its other formats some start programs."""
_END = b"\xff\xd9"
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


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


def is_image(data: bytes) -> bool:
    """True if the first bytes are those of an image format read here, or of a gzip file."""
    try:
        return data[:2] == b"\x1f\x8b" or bool(_form(data))
    except Refused:
        return False


def _gunzip(data: bytes, limit: int) -> bytes:
    """Unpack all members of a gzip file; what follows the last one is ignored, as gzip does."""
    result = b""
    while data[:2] == b"\x1f\x8b":
        engine = zlib.decompressobj(wbits=31)
        try:
            result += engine.decompress(data, limit + 1 - len(result))
        except zlib.error as error:
            wrong = "bad checksum" if "incorrect data check" in str(error) else str(error)
            raise Refused("corrupt", f"gzip member: {wrong}") from None
        if engine.unconsumed_tail or len(result) > limit:
            raise Refused("too-many-bytes", f"unpacks to more than {limit} bytes")
        if not engine.eof:
            raise Refused("truncated", "gzip member ends early")
        data = engine.unused_data
    return result


def _form(data: bytes) -> str:
    for magic, form in _MAGIC:
        if data.startswith(magic):
            return form
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        if b"avif" not in brands:
            raise Refused(
                "unsupported", f"ISO media of brand {brands[:4]!r}, such as HEIC or video"
            )
        if "AVIF" not in PIL_FORMATS:
            raise Refused("unsupported", "AVIF needs Pillow 11.3 or later")
        return "avif"
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
    """Colour transform the Adobe marker names; -1 without one."""
    orientation: int = 1
    scan: int = 0
    """Where the first scan starts."""
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
            head.scan = place
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
    _check_size(head.width, head.height, "jpeg", rules)
    # libjpeg reads further scans only where the first one does not hold everything.
    several = head.sof in _PROGRESSIVE or data[head.scan + 4] < head.components
    if several and data.count(b"\xff\xda", head.scan) > _MAX_SCANS:
        raise Refused("too-many-scans", f"more than {_MAX_SCANS} scans")
    repairs += _jpeg_faults(head, rules)
    try:
        small = _strict_decode(data, head, rules, repairs)
    except Refused:
        if data.find(_END, head.scan) >= 0 or not _has_all_coefficients(data, head):
            raise
        whole = data.removesuffix(b"\xff") + _END
        with contextlib.suppress(Refused):
            small = _strict_decode(whole, head, rules, repairs)
            data = whole
            repairs.append("missing-end")
        if data is not whole:
            raise
    if _END not in data[-64:]:
        # Readers that look for the end marker where a file ends would call this one cut off.
        data = data[: data.rfind(_END) + 2]
        repairs.append("trailing-bytes")
    if set(repairs) - {"gzip", "trailing-bytes", "missing-end"} or rules.format != "jpeg":
        return _reencode(data, "jpeg", rules, repairs)
    return CleanImage(data, head.width, head.height, "jpeg", _hash(small, rules), tuple(repairs))


def _has_all_coefficients(data: bytes, head: _Header) -> bool:
    """True if the scans announce the last bit of every coefficient of every component.

    Only then can a strict decode tell whether anything but the end marker is missing: it does not
    miss a scan of a progressive file.
    """
    known = {component: np.zeros(64, bool) for component in head.ids}
    place = head.scan
    while place + 4 <= len(data) and data[place] == 0xFF:
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + length]
        after = place + 2 + length
        if data[place + 1] == 0xDA and len(body) >= 4 + 2 * body[0]:
            first, last, bits = body[1 + 2 * body[0] : 4 + 2 * body[0]]
            for component in body[1 : 1 + 2 * body[0] : 2]:
                if component in known and bits & 15 == 0:
                    known[component][first : last + 1] = True
            found = _NEXT_MARKER.search(data, after)
            after = found.start() if found else len(data)
        place = after
    return bool(known) and all(done.all() for done in known.values())


def _jpeg_faults(head: _Header, rules: Rules) -> list[str]:
    """Why bytes that decode may still not be passed through: some reader would see them wrongly."""
    faults = []
    if head.sof not in (0xC0, 0xC1, 0xC2) or head.precision != 8:
        faults.append("unusual-coding")
    if head.components == 4:
        # As libjpeg and browsers have it: without an Adobe marker, or with transform 0, the four
        # channels are CMYK, else YCCK; either way they are stored inverted. PIL decodes so, too.
        faults.append("ycck" if head.adobe > 0 else "cmyk")
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


def _check_size(width: int, height: int, form: str, rules: Rules) -> None:
    pixels = width * height
    if pixels > rules.max_pixels:
        raise Refused("too-many-pixels", f"{width}x{height} is above {rules.max_pixels} pixels")
    needed, budget = pixels * _COSTLY.get(form, 0), BYTES_PER_PIXEL * rules.max_pixels
    if needed > budget:
        size = f"{width}x{height} as {form} takes {needed >> 20} MiB to decode"
        raise Refused("too-many-pixels", f"{size}, a worker has {budget >> 20}")
    if min(width, height) < max(1, rules.min_side):
        raise Refused("too-small", f"{width}x{height}: a side is under {rules.min_side}")


def _reencode(data: bytes, form: str, rules: Rules, repairs: list[str]) -> CleanImage:
    """Decode with PIL, bring to plain upright 8-bit RGB, and encode anew."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=PIL_FORMATS)
            _check_size(*image.size, form, rules)
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
    phash = _hash(np.asarray(image.convert("L")), rules) if rules.perceptual else 0
    encoded = _encode(image, form, rules)
    return CleanImage(encoded, image.width, image.height, form, phash, tuple(repairs))


def _upright_rgb(image: Image.Image, rules: Rules, repairs: list[str]) -> Image.Image:
    if image.mode == "I" and getattr(image, "tag_v2", {}).get(258, (16,)) != (16,):
        raise Refused("unsupported", "32-bit pixels have no agreed range")
    if rules.exif == "apply" and image.getexif().get(0x0112, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        if "exif-rotation" not in repairs:
            repairs.append("exif-rotation")
    if image.mode.startswith("I"):
        repairs.append("16-bit")
        image = _eight_bits(image)
    elif image.mode == "F":
        raise Refused("unsupported", "floating-point pixels have no agreed range")
    if image.mode == "P":
        repairs.append("palette")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        repairs.append("alpha")
        return _on_white(image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The high bytes of 16-bit gray, whatever its values: a dark picture stays dark."""
    values = np.asarray(image)
    return Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of a picture with transparency over white; by rows, for the intermediate copies."""
    flat = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        flat.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return flat


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
