"""The batched operations against timm's functions on PIL pictures, byte for byte."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from photo_shards import photo
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP
from timm.data.transforms import RandomResizedCropAndInterpolation

from l2vit.data import augment_gpu, pil
from l2vit.data.augment import NO_OP, OPS
from l2vit.data.shards import BadSample

SIZE = 48
FILL = (124, 116, 104)
EXIF_TURNED = b"Exif\0\0" + bytes.fromhex(
    "4d4d002a 00000008 0001 01120003 00000001 00060000 00000000"
)
RANGES = {
    "Rotate": (-30, 30),
    "Posterize": (0, 8),
    "Solarize": (0, 256),
    "SolarizeAdd": (0, 110),
    "Color": (0.1, 1.9),
    "Contrast": (0.1, 1.9),
    "Brightness": (0.1, 1.9),
    "Sharpness": (0.1, 1.9),
    "ShearX": (-0.3, 0.3),
    "ShearY": (-0.3, 0.3),
    "TranslateXRel": (-0.45, 0.45),
    "TranslateYRel": (-0.45, 0.45),
}


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    """Photographs, and what breaks histograms: one colour, noise, an empty channel, two values."""
    rng = np.random.default_rng(0)
    x = np.stack([photo(i, SIZE, SIZE) for i in range(24)])
    x[0] = 7
    x[1] = rng.integers(0, 256, (SIZE, SIZE, 3))
    x[2, ..., 1] = 0
    x[3] = np.where(rng.random((SIZE, SIZE, 3)) < 0.01, 200, 100)
    return x


def arguments_of(name: str, count: int) -> np.ndarray:
    """Both ends and values between; 0 first, which some functions treat apart."""
    low, high = RANGES.get(name, (0, 0))
    values = np.random.default_rng(1).uniform(low, high, count)
    values[:3] = 0, low, high
    whole = name in ("Posterize", "Solarize", "SolarizeAdd")
    return np.trunc(values) if whole else values


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("name", OPS)
def test_every_operation_gives_timms_bytes(batch, name, interpolation):
    values = arguments_of(name, len(batch))
    resample = pil.RESAMPLING[interpolation]
    expected = np.empty_like(batch)
    for i, value in enumerate(values.tolist()):
        takes_none = name in ("AutoContrast", "Equalize", "Invert")
        whole = name in ("Posterize", "Solarize", "SolarizeAdd")
        arguments = () if takes_none else (int(value) if whole else value,)
        picture = Image.fromarray(batch[i])
        expected[i] = NAME_TO_OP[name](picture, *arguments, fillcolor=FILL, resample=resample)
    ops = np.full((len(batch), 1), OPS.index(name), np.int16)
    for carry_out in (augment_gpu.apply_ops, pil.apply_ops):
        pixels = torch.from_numpy(batch.copy())
        found = carry_out(pixels, ops, values[:, None], fill=FILL, interpolation=interpolation)
        np.testing.assert_array_equal(found.numpy(), expected)


def test_layers_in_order_and_samples_apart(batch):
    rng = np.random.default_rng(2)
    ops = rng.integers(NO_OP, len(OPS), (len(batch), 3)).astype(np.int16)
    values = np.array(
        [
            [arguments_of(OPS[op], 30)[rng.integers(30)] if op >= 0 else 0 for op in row]
            for row in ops
        ]
    )
    found = [
        carry_out(torch.from_numpy(batch.copy()), ops, values, fill=FILL, interpolation="bicubic")
        for carry_out in (augment_gpu.apply_ops, pil.apply_ops)
    ]
    assert torch.equal(*found)
    still = (ops == NO_OP).all(1)
    np.testing.assert_array_equal(found[0].numpy()[still], batch[still])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_and_resize_like_timm(interpolation):
    """timm's crop and resize of the same box, but for one in hundreds of bytes, off by one."""
    timms = RandomResizedCropAndInterpolation(64, interpolation=interpolation)
    worst = []
    for i, box in enumerate([(0, 0, 150, 200), (10, 20, 33, 50), (3, 1, 140, 64), (5, 5, 9, 12)]):
        picture = photo(i, 200, 150)
        timms.get_params = lambda *_, box=box: box
        expected = np.asarray(timms(Image.fromarray(picture)), int)
        found = pil.crop_resize(picture, np.array(box), 64, interpolation)
        difference = np.abs(found - expected)
        worst.append((difference.mean(), difference.max()))
    assert max(mean for mean, _ in worst) < 0.02 and max(top for _, top in worst) <= 2, worst


@pytest.mark.parametrize(
    "mode, options",
    [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": "4:4:4"}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"exif": EXIF_TURNED}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_decoding_is_pillows_but_refuses_damage(mode, options):
    for seed, size in enumerate([(90, 70), (1, 1), (300, 3)]):
        stream = io.BytesIO()
        picture = Image.fromarray(photo(seed, *np.maximum(size, 20))).resize(size)
        picture.convert(mode).save(stream, "JPEG", **options)
        image = stream.getvalue()
        expected = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        np.testing.assert_array_equal(pil.decode(image), expected)
    scan = image.index(b"\xff\xda")
    for damaged in (image[: scan + 40], image[: scan + 40] + b"\xff\xd9"):
        with pytest.raises(BadSample, match="cannot be decoded"):
            pil.decode(damaged)


@pytest.mark.gpu
def test_the_gpu_gives_the_same_bytes(batch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for name in OPS:
        values = arguments_of(name, len(batch))[:, None]
        ops = np.full((len(batch), 1), OPS.index(name), np.int16)
        host, device = (
            augment_gpu.apply_ops(
                torch.from_numpy(batch.copy()).to(where),
                ops,
                values,
                fill=FILL,
                interpolation="bicubic",
            ).cpu()
            for where in ("cpu", "cuda")
        )
        assert torch.equal(host, device), name
