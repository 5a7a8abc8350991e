"""Every malformed kind of image, made by real encoders or by damaging real files."""

import contextlib
import io
import random
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from raw_archives import encoded, jpeg, picture, zipped

from data_prep.clean import Refused, clean, perceptual_hash
from data_prep.options import Rules

RULES = Rules()


def reason(data, rules=RULES):
    with pytest.raises(Refused) as caught:
        clean(data, rules)
    return caught.value.reason


def pixels(data):
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG" and image.mode == "RGB"
    assert image.getexif().get(0x0112, 1) == 1
    return np.asarray(image).astype(int)


def close(data, expected, tolerance=6.0):
    """Mean difference of a re-encoded image from the pixels it should show."""
    found = pixels(data)
    expected = np.asarray(expected.convert("RGB")).astype(int)
    assert found.shape == expected.shape
    return np.abs(found - expected).mean() < tolerance


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"quality": 100},
        {"restart_marker_blocks": 2},
        {"comment": b"a comment"},
    ],
)
def test_a_sound_jpeg_passes_byte_for_byte(options):
    data = jpeg(1, **options)
    good = clean(data, RULES)
    assert good.data is data and good.repairs == () and good.form == "jpeg"
    assert (good.width, good.height) == (96, 72)


def test_a_gray_jpeg_passes_byte_for_byte():
    data = encoded(picture(2).convert("L"))
    assert clean(data, RULES).data is data


def test_gzip_members_are_unpacked_not_reencoded():
    data = jpeg(3)
    good = clean(zipped(data), RULES)
    assert good.data == data and good.repairs == ("gzip",)
    assert clean(zipped(encoded(picture(3), "PNG")), RULES).repairs == ("gzip", "png")


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_other_formats_under_a_jpeg_name(form):
    options = {"lossless": True} if form == "WEBP" else {}
    good = clean(encoded(picture(4), form, **options), RULES)
    assert form.lower() in good.repairs and good.form == form.lower()
    assert close(good.data, picture(4), 12 if form == "GIF" else 6)


def test_cmyk_and_ycck():
    cmyk = picture(5).convert("CMYK")
    good = clean(encoded(cmyk, quality=95), RULES)
    assert good.repairs in (("cmyk",), ("ycck",)) and close(good.data, cmyk)
    # the Adobe marker's last byte says YCCK
    raw = bytearray(encoded(cmyk, quality=95))
    place = raw.find(b"Adobe")
    assert place > 0
    raw[place + 11] = 2
    assert clean(bytes(raw), RULES).repairs == ("ycck",)


def test_rgb_coded_jpeg_is_brought_to_ycbcr():
    data = encoded(picture(6), quality=95, keep_rgb=True)
    good = clean(data, RULES)
    assert good.repairs == ("rgb-jpeg",) and close(good.data, picture(6))


def test_alpha_palette_and_16_bit():
    base = picture(7)
    veil = base.copy()
    veil.putalpha(Image.new("L", base.size, 0))
    good = clean(encoded(veil, "PNG"), RULES)
    assert good.repairs == ("png", "alpha")
    assert pixels(good.data).min() >= 250  # transparent everywhere: the white behind it
    flat = base.quantize(16)
    assert clean(encoded(flat, "PNG"), RULES).repairs == ("png", "palette")
    assert close(clean(encoded(flat, "PNG"), RULES).data, flat)
    deep = np.asarray(base.convert("L")).astype(np.uint16) * 257
    good = clean(encoded(Image.fromarray(deep), "PNG"), RULES)
    assert good.repairs == ("png", "16-bit") and close(good.data, base.convert("L"))


def with_orientation(image, value):
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(image, quality=95, exif=exif)


@pytest.mark.parametrize("value", range(2, 9))
def test_exif_rotation_is_applied_to_the_pixels(value):
    from PIL import ImageOps

    data = with_orientation(picture(8), value)
    good = clean(data, RULES)
    assert good.repairs == ("exif-rotation",)
    assert close(good.data, ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    kept = clean(data, Rules(exif="keep"))
    assert kept.data is data and not kept.repairs


def test_upright_exif_is_no_defect():
    data = with_orientation(picture(8), 1)
    assert clean(data, RULES).data is data


def test_truncated_empty_html_and_unknown():
    data = jpeg(9)
    assert reason(data[: len(data) // 2]) == "truncated"
    assert reason(data[:200]) in ("truncated", "corrupt")
    assert reason(b"") == "empty"
    assert reason(b"<!DOCTYPE html><html><body>404</body></html>") == "html"
    assert reason(b"\n <html>gone</html>") == "html"
    assert reason(bytes(1000)) == "unrecognised"
    assert reason(zipped(data)[:-200]) == "truncated"
    assert reason(encoded(picture(9), "PNG")[:3000]) in ("truncated", "corrupt")


def test_bytes_after_the_end_are_cut_off():
    data = jpeg(10)
    good = clean(data + b"<!-- trailer -->" * 20, RULES)
    assert good.data == data and good.repairs == ("trailing-bytes",)
    short = data + b"\0" * 8
    assert clean(short, RULES).data is short


def test_bit_flips_are_judged_as_a_full_decode_judges_them():
    """The reduced decode must refuse exactly what a full strict decode refuses."""
    draw = random.Random(0)
    originals = [jpeg(11), jpeg(12, progressive=True), jpeg(13, restart_marker_blocks=4)]
    refused = 0
    for trial in range(600):
        data = bytearray(originals[trial % 3])
        place = draw.randrange(2, len(data))
        data[place] ^= 1 << draw.randrange(8)
        data = bytes(data[:place] if trial % 7 == 0 else data)
        try:
            simplejpeg.decode_jpeg(data, "RGB", strict=True)
            full = True
        except ValueError:
            full = False
        try:
            clean(data, Rules(min_side=1, perceptual=trial % 2 == 0))
            reduced = True
        except Refused as refusal:
            reduced = False
            # the size and coding checks look at the header alone
            full &= refusal.reason in ("truncated", "corrupt")
        assert reduced == full, (trial, place)
        refused += not full
    assert refused > 60


def bomb_png(side):
    """A tiny PNG whose header promises side × side pixels."""

    def chunk(kind, body):
        framed = kind + body
        return struct.pack(">I", len(body)) + framed + struct.pack(">I", zlib.crc32(framed))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    packed = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + packed + chunk(b"IEND", b"")


def test_decompression_bombs():
    assert reason(bomb_png(60_000)) == "too-many-pixels"
    data = bytearray(jpeg(14))
    frame = data.find(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    assert reason(bytes(data)) == "too-many-pixels"
    assert reason(zipped(bytes(1 << 22)), Rules(max_bytes=1 << 20)) == "too-many-bytes"


def test_a_scan_bomb_is_refused():
    data = jpeg(15, progressive=True)
    scan = data.find(b"\xff\xda")
    assert reason(data[:scan] + data[scan:-2] * 100 + data[-2:]) == "too-many-scans"


def test_small_sides():
    assert reason(jpeg(16, 31, 200)) == "too-small"
    assert reason(encoded(picture(16, 200, 31), "PNG")) == "too-small"
    assert clean(jpeg(16, 32, 32), RULES).width == 32
    assert clean(jpeg(16, 9, 8), Rules(min_side=0)).height == 8


def test_the_short_side_can_be_capped():
    good = clean(jpeg(17, 300, 200), Rules(max_short_side=100))
    assert (good.width, good.height) == (150, 100) and good.repairs == ("resized",)
    assert close(good.data, picture(17, 300, 200).resize((150, 100), Image.Resampling.LANCZOS), 8)
    data = jpeg(17, 300, 100)
    assert clean(data, Rules(max_short_side=100)).data is data


def test_webp_out():
    good = clean(jpeg(18), Rules(format="webp", quality=90))
    image = Image.open(io.BytesIO(good.data))
    assert image.format == "WEBP" and image.size == (96, 72)


def photographs():
    from sklearn.datasets import load_sample_images

    for photo in load_sample_images().images:
        for left in range(0, 240, 80):
            yield Image.fromarray(photo).crop((left, 20, left + 400, 320))


def test_perceptual_hash_survives_resizing_and_tells_pictures_apart():
    rules, hashes = Rules(perceptual=True), []
    for photo in photographs():
        here = clean(encoded(photo, quality=95), rules).phash
        small = photo.resize((224, 168))
        for copy in (encoded(small, quality=60), encoded(small, "PNG")):
            assert (here ^ clean(copy, rules).phash).bit_count() <= 3
        hashes.append(here)
    for place, one in enumerate(hashes):
        assert all((one ^ other).bit_count() > 6 for other in hashes[:place])


def test_perceptual_hash_equals_a_plain_float64_dct():
    gray = np.asarray(picture(31, 40, 24).convert("L"))
    values = np.zeros((8, 8))
    for u in range(8):
        for v in range(8):
            down = np.cos(np.pi * u * (2 * np.arange(24)[:, None] + 1) / 48)
            across = np.cos(np.pi * v * (2 * np.arange(40)[None, :] + 1) / 80)
            values[u, v] = (gray * down * across).sum()
    bits = 0
    for place, value in enumerate(values.ravel()):
        bits |= int(value > np.median(values)) << place
    assert perceptual_hash(gray) == bits


def without_segment(data, marker):
    """The JPEG without its first segment of a kind."""
    place = data.find(bytes([0xFF, marker]))
    length = int.from_bytes(data[place + 2 : place + 4], "big")
    return data[:place] + data[place + 2 + length :]


def test_cmyk_is_decoded_as_libjpeg_and_browsers_do():
    """One colour; expected values as headless Chromium draws the three files on a canvas."""
    flat = encoded(Image.new("CMYK", (64, 64), (20, 200, 120, 30)), quality=95)
    ycck = bytearray(flat)
    ycck[flat.find(b"Adobe") + 11] = 2
    cases = [
        (flat, "cmyk", (207, 48, 119)),
        (without_segment(flat, 0xEE), "cmyk", (207, 48, 119)),  # no Adobe marker
        (bytes(ycck), "ycck", (8, 0, 131)),
    ]
    for data, repair, colour in cases:
        good = clean(data, RULES)
        assert good.repairs == (repair,)
        assert np.abs(pixels(good.data)[32, 32] - colour).max() <= 3


@pytest.mark.parametrize("top", [200, 255, 256, 5000, 65535])
def test_16_bit_gray_is_scaled_by_its_depth_not_by_its_values(top):
    values = np.linspace(0, top, 96 * 72).reshape(72, 96).astype(np.uint16)
    for form in ("PNG", "TIFF"):
        good = clean(encoded(Image.fromarray(values), form), RULES)
        assert good.repairs == (form.lower(), "16-bit")
        assert np.abs(pixels(good.data)[:, :, 0] - values / 257).max() <= 3


def test_pixels_without_an_agreed_range_are_refused():
    values = np.arange(96 * 72).reshape(72, 96)
    for kind in (np.int32, np.float32):
        assert reason(encoded(Image.fromarray(values.astype(kind)), "TIFF")) == "unsupported"


def test_gzip_members_are_joined():
    data = jpeg(40)
    parts = zipped(data[:1000]) + zipped(data[1000:])
    assert clean(parts, RULES).data == data
    assert clean(parts + bytes(512), RULES).data == data  # as gzip does, zeros are ignored
    assert reason(zipped(data[:1000]) + zipped(data[1000:])[:-300]) == "truncated"
    assert reason(zipped(data) * 3, Rules(max_bytes=2 * len(data))) == "too-many-bytes"
    spoilt = bytearray(zipped(data))
    spoilt[-8] ^= 1  # the checksum
    with pytest.raises(Refused) as caught:
        clean(bytes(spoilt), RULES)
    assert (caught.value.reason, caught.value.detail) == ("corrupt", "gzip member: bad checksum")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}])
def test_a_jpeg_that_lacks_only_its_end_marker_gets_one(options):
    data = jpeg(41, **options)
    for cut in (1, 2):
        good = clean(data[:-cut], RULES)
        assert good.data == data and good.repairs == ("missing-end",)


def test_a_progressive_jpeg_that_lacks_scans_is_truncated():
    """Each cut lies between two scans: nothing but the missing scans tells."""
    data = jpeg(42, progressive=True)
    scans = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    assert len(scans) > 5
    tables = [data.rfind(b"\xff\xc4", 0, place) for place in scans[1:]]
    for place in {*scans[1:], *tables}:
        assert reason(data[:place]) == "truncated"


def test_every_shorter_jpeg_is_truncated():
    data = jpeg(43)
    for cut in range(5, 600, 7):
        assert reason(data[:-cut]) in ("truncated", "corrupt")


@pytest.mark.parametrize("marker", [0xC2, 0xC6, 0xCA, 0xCE])
def test_scan_bombs_of_every_progressive_coding_are_refused(marker):
    data = bytearray(jpeg(44, progressive=True))
    data[data.find(b"\xff\xc2") + 1] = marker
    scan = data.find(b"\xff\xda")
    assert reason(bytes(data[:scan] + data[scan:-2] * 300 + data[-2:])) == "too-many-scans"


def test_scan_bombs_of_sequential_codings_are_refused():
    """One component, over and over; a scan of all components ends the picture for libjpeg."""
    data = bytearray(jpeg(44))
    scan = data.find(b"\xff\xda")
    length = int.from_bytes(data[scan + 2 : scan + 4], "big")
    body = bytes(data[scan + 2 + length : -2])
    one = b"\xff\xda\x00\x08\x01" + bytes(data[scan + 5 : scan + 7]) + b"\x00\x3f\x00"
    assert reason(bytes(data[:scan]) + (one + body) * 300 + b"\xff\xd9") == "too-many-scans"
    whole = bytes(data[:scan] + data[scan:-2] * 300 + data[-2:])
    with contextlib.suppress(Refused):
        assert np.array_equal(pixels(clean(whole, RULES).data), pixels(bytes(data)))


def test_avif_and_heic():
    from PIL import features

    heic = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(200)
    assert reason(heic) == "unsupported"
    if features.check("avif"):
        good = clean(encoded(picture(45), "AVIF", quality=90), RULES)
        assert good.repairs == ("avif",) and good.form == "avif" and close(good.data, picture(45))


MEASURE = """
import pathlib, sys
from data_prep.clean import Refused, clean
from data_prep.options import Rules
def memory(what):
    return int(open("/proc/self/status").read().split(what)[1].split()[0]) << 10
for name in ["small.png", *sys.argv[2:]]:
    data = pathlib.Path(name).read_bytes()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, refused = memory("VmRSS:"), "-"
    try:
        clean(data, Rules(max_pixels=int(sys.argv[1])))
    except Refused as refusal:
        refused = refusal.reason
    print(name, refused, memory("VmHWM:") - before)
"""


def test_the_memory_of_a_worker_has_a_bound(tmp_path):
    import os
    import subprocess
    import sys

    from data_prep.clean import BYTES_PER_PIXEL

    side = 2000
    base = picture(46, side // 4, side // 4).resize((side, side))
    gray, cmyk = base.convert("L"), base.convert("CMYK")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    files = {
        "small.png": encoded(picture(47), "PNG"),
        "palette": encoded(gray.convert("P"), "PNG", transparency=b"\0\x80", compress_level=1),
        "alpha": encoded(base.convert("RGBA"), "PNG", compress_level=1),
        "deep": encoded(deep, "PNG", compress_level=1),
        "cmyk": encoded(cmyk, progressive=True, subsampling=0),
        "webp": encoded(base, "WEBP", method=0),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", MEASURE, str(side * side), *list(files)[1:]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    rows = [line.split() for line in found.stdout.splitlines()][1:]
    # WebP's decoder keeps several canvases: refused before it is asked.
    assert [row[1] for row in rows] == ["-", "-", "-", "-", "too-many-pixels"]
    for name, _, peak in rows:
        assert int(peak) < BYTES_PER_PIXEL * side * side + (24 << 20), name
