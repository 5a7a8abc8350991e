"""What is done to each picture, drawn on the CPU: a pure function of (seed, epoch, sample).

The distributions are timm's (``transforms_imagenet_train`` and ``RandomErasing``); the random
numbers are not: they come from a counter-based generator, so that any rank, any backend and any
resumed run draws the same for the same sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from timm.data.auto_augment import RandAugment, rand_augment_transform

from l2vit.data.config import AugmentConfig
from l2vit.data.rng import LATEST_DRAWS, derive_key, uniforms
from l2vit.errors import ConfigError

CROP_ATTEMPTS = 10
ERASE_ATTEMPTS = 10
ERASE_AREA = (0.02, 1 / 3)
ERASE_RATIO = (0.3, 1 / 0.3)
_DENOMINATOR = 10.0
"""timm's magnitudes count tenths of an operation's full strength."""
_TRANSLATE_SHARE = 0.45

OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
"""The operations by number; each takes at most one argument."""
OP_NUMBER = {name: number for number, name in enumerate(OPS)}
NO_OP = -1
_JITTER = ("Brightness", "Contrast", "Color")


def _enhance(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return level / _DENOMINATOR * 1.8 + 0.1


def _enhance_increasing(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.maximum(0.1, 1.0 + sign * (level / _DENOMINATOR * 0.9))


def _signed(full: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda level, sign: sign * (level / _DENOMINATOR * full)


def _whole(full: float, most: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda level, sign: np.minimum(most, np.trunc(level / _DENOMINATOR * full))


def _none(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.zeros_like(level)


_ARGUMENT: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "AutoContrast": ("AutoContrast", _none),
    "Equalize": ("Equalize", _none),
    "Invert": ("Invert", _none),
    "Rotate": ("Rotate", _signed(30.0)),
    "Posterize": ("Posterize", _whole(4, math.inf)),
    "PosterizeIncreasing": ("Posterize", lambda level, sign: 4 - _whole(4, math.inf)(level, sign)),
    "Solarize": ("Solarize", _whole(256, 256)),
    "SolarizeIncreasing": ("Solarize", lambda level, sign: 256 - _whole(256, 256)(level, sign)),
    "SolarizeAdd": ("SolarizeAdd", _whole(110, 128)),
    "Color": ("Color", _enhance),
    "ColorIncreasing": ("Color", _enhance_increasing),
    "Contrast": ("Contrast", _enhance),
    "ContrastIncreasing": ("Contrast", _enhance_increasing),
    "Brightness": ("Brightness", _enhance),
    "BrightnessIncreasing": ("Brightness", _enhance_increasing),
    "Sharpness": ("Sharpness", _enhance),
    "SharpnessIncreasing": ("Sharpness", _enhance_increasing),
    "ShearX": ("ShearX", _signed(0.3)),
    "ShearY": ("ShearY", _signed(0.3)),
    "TranslateXRel": ("TranslateXRel", _signed(_TRANSLATE_SHARE)),
    "TranslateYRel": ("TranslateYRel", _signed(_TRANSLATE_SHARE)),
}
"""timm's name of an operation: ours, and its argument from level and sign."""


@dataclass(frozen=True)
class AugmentParams:
    """The parameters of a batch of n pictures, all but the crop's pixels, which need its size."""

    crop: np.ndarray
    """(n, CROP_ATTEMPTS, 4) float64 in [0, 1): area, ratio, top, left of each attempt."""
    flip: np.ndarray
    """(n,) bool."""
    ops: np.ndarray
    """(n, layers) int16: number in ``OPS`` or ``NO_OP``, in the order of application."""
    arguments: np.ndarray
    """(n, layers) float64: degrees, bits, threshold, amount, factor, shear or share of the side."""
    erase: np.ndarray
    """(n, 4) int64: top, left, height, width of the erased box; height 0 for none."""
    noise_keys: np.ndarray
    """(n,) uint64: key of each picture's erasing noise."""


class AugmentSampler:
    """Draws the augmentation parameters of ``augment`` at ``input_size`` pixels.

    Args:
        augment: what is done, and how strongly.
        input_size: of the pictures, pixels.
        seed: the run's.
        draws: version of the draws (``run.draws``), 0 for the newest.

    Raises:
        ConfigError: a RandAugment string that cannot be followed exactly.
    """

    def __init__(
        self, augment: AugmentConfig, *, input_size: int, seed: int, draws: int = 0
    ) -> None:
        self.augment = augment
        self.draws = draws or LATEST_DRAWS
        self.input_size = input_size
        self._seed = seed
        self._rand = parse_rand_augment(augment)
        self._jitter = augment.color_jitter if self._rand is None else 0.0

    def sample(self, epoch: int, sample_ids: np.ndarray) -> AugmentParams:
        """The parameters of samples ``sample_ids`` (n,) in ``epoch``."""
        ids = np.asarray(sample_ids)
        stream = _Stream(ids, self._seed, epoch)
        crop = stream("crop", 4 * CROP_ATTEMPTS).reshape(-1, CROP_ATTEMPTS, 4)
        flip = stream("flip", 1)[:, 0] < self.augment.hflip
        ops, arguments = self._sample_ops(stream)
        erase = self._sample_erase(stream("erase", 1 + 4 * ERASE_ATTEMPTS))
        noise = (stream("noise", 1)[:, 0] * 2.0**53).astype(np.uint64)
        return AugmentParams(crop, flip, ops, arguments, erase, noise)

    def _sample_ops(self, stream: _Stream) -> tuple[np.ndarray, np.ndarray]:
        if self._rand is not None:
            return draw_rand_augment(self._rand, stream)
        if self._jitter:
            return _draw_jitter(self._jitter, stream("jitter", 6))
        empty = np.zeros((len(stream.ids), 0))
        return empty.astype(np.int16), empty

    def _sample_erase(self, u: np.ndarray) -> np.ndarray:
        """timm's ``RandomErasing``, one box: the first of ten attempts that fits."""
        attempts = u[:, 1:].reshape(-1, ERASE_ATTEMPTS, 4)
        area = _between(attempts[..., 0], *ERASE_AREA) * self.input_size**2
        ratio = _log_between(attempts[..., 1], *ERASE_RATIO)
        height = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        width = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (height < self.input_size) & (width < self.input_size)
        row, first = np.arange(len(u)), fits.argmax(axis=1)
        height, width = height[row, first], width[row, first]
        top = _whole_between(attempts[row, first, 2], self.input_size - height)
        left = _whole_between(attempts[row, first, 3], self.input_size - width)
        # timm skips when its number is above the probability
        erased = (u[:, 0] < self.augment.erase_prob) & fits.any(axis=1)
        return np.where(erased[:, None], np.stack([top, left, height, width], axis=1), 0)

    def boxes(self, params: AugmentParams, sizes: np.ndarray) -> np.ndarray:
        """Crop boxes (n, 4: top, left, height, width) of images of ``sizes`` (n, 2: height, width).

        timm's ``RandomResizedCropAndInterpolation``: the first of ten attempts that fits, else a
        central crop of the nearest allowed ratio.
        """
        scale, ratios = self.augment.scale, self.augment.ratio
        sizes = np.asarray(sizes, np.int64)
        image_h, image_w = sizes[:, :1], sizes[:, 1:]
        area = _between(params.crop[..., 0], *scale) * (image_h * image_w)
        ratio = _log_between(params.crop[..., 1], *ratios)
        # at least a pixel, where timm's crop of a picture of a few pixels is empty and fails
        width = np.maximum(1, np.rint(np.sqrt(area * ratio)).astype(np.int64))
        height = np.maximum(1, np.rint(np.sqrt(area / ratio)).astype(np.int64))
        fits = (width <= image_w) & (height <= image_h)
        row, first = np.arange(len(sizes)), fits.argmax(axis=1)
        height, width = height[row, first], width[row, first]
        top = _whole_between(params.crop[row, first, 2], sizes[:, 0] - height)
        left = _whole_between(params.crop[row, first, 3], sizes[:, 1] - width)
        box = np.stack([top, left, height, width], axis=1)
        return np.where(fits.any(axis=1)[:, None], box, _central_boxes(sizes, ratios))


class _Stream:
    """Independent uniform numbers by purpose, one row for each sample."""

    def __init__(self, ids: np.ndarray, seed: int, epoch: int) -> None:
        self.ids = ids
        self._seed, self._epoch = seed, epoch

    def __call__(self, purpose: str, count: int) -> np.ndarray:
        return uniforms(derive_key(purpose, self._seed, self._epoch), self.ids, count)


def parse_rand_augment(augment: AugmentConfig) -> RandAugment | None:
    """timm's own reading of the RandAugment string; None where the recipe has none.

    Raises:
        ConfigError: no RandAugment string, or one with weights or operations not in ``OPS``.
    """
    text = augment.auto_augment
    if not text:
        return None
    try:
        parsed = rand_augment_transform(text, {"img_mean": fill_colour(augment)})
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"auto_augment: {text!r} is no RandAugment string ({error})") from None
    unknown = [op.name for op in parsed.ops if op.name not in _ARGUMENT]
    if unknown or parsed.choice_weights is not None:
        what = f"operation {unknown[0]}" if unknown else "weighted choice"
        raise ConfigError(f"auto_augment: {text!r} asks for {what}, which is not supported")
    return parsed


def fill_colour(augment: AugmentConfig) -> tuple[int, int, int]:
    """The colour that geometric operations leave behind: the mean colour in 0 … 255, as timm's."""
    red, green, blue = (min(255, round(255 * x)) for x in augment.mean)
    return red, green, blue


def draw_rand_augment(rand: RandAugment, stream: _Stream) -> tuple[np.ndarray, np.ndarray]:
    """Operations and arguments (n, layers): chosen with replacement, applied with ``op.prob``."""
    layers, known = rand.num_layers, len(rand.ops)
    u = stream("rand", 5 * layers).reshape(-1, layers, 5)
    choice = (u[..., 0] * known).astype(np.int64)
    applied = u[..., 1] < np.array([op.prob for op in rand.ops])[choice]
    # Box-Muller; 1 − u keeps the logarithm finite
    normal = np.sqrt(-2 * np.log(1 - u[..., 2])) * np.cos(2 * np.pi * u[..., 3])
    sign = np.where(u[..., 4] < 0.5, -1.0, 1.0)
    level = _levels(rand, choice, normal, u[..., 2])
    ops = np.full(choice.shape, NO_OP, np.int16)
    arguments = np.zeros(choice.shape)
    for number, op in enumerate(rand.ops):
        ours, argument = _ARGUMENT[op.name]
        mask = applied & (choice == number)
        ops[mask] = OP_NUMBER[ours]
        arguments[mask] = argument(level[mask], sign[mask])
    return ops, arguments


def _levels(rand: RandAugment, choice: np.ndarray, normal: np.ndarray, u: np.ndarray) -> np.ndarray:
    """timm's magnitude: normal about the mean, or uniform up to it, clipped to what is allowed."""
    op = rand.ops[0]  # timm gives all operations of one string the same magnitude settings
    magnitude, spread = float(op.magnitude), float(op.magnitude_std)
    level = u * magnitude if math.isinf(spread) else magnitude + spread * normal
    return np.clip(level, 0.0, float(op.magnitude_max or _DENOMINATOR))


def _draw_jitter(strength: float, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's ``ColorJitter(strength, strength, strength)``: three factors, any order."""
    order = np.argsort(u[:, :3], axis=1, kind="stable")
    factor = _between(u[:, 3:], max(0.0, 1 - strength), 1 + strength)
    numbers = np.array([OP_NUMBER[name] for name in _JITTER], np.int16)
    return numbers[order], np.take_along_axis(factor, order, axis=1)


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u


def _log_between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.exp(_between(u, math.log(low), math.log(high)))


def _whole_between(u: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Uniform integers 0 … most, both included."""
    return (u * (np.maximum(most, 0) + 1)).astype(np.int64)


def _central_boxes(sizes: np.ndarray, ratios: tuple[float, float]) -> np.ndarray:
    height, width = sizes[:, 0], sizes[:, 1]
    ratio = width / height
    tall, wide = ratio < min(ratios), ratio > max(ratios)
    crop_h = np.where(tall, np.rint(width / min(ratios)).astype(np.int64), height)
    crop_w = np.where(wide, np.rint(height * max(ratios)).astype(np.int64), width)
    return np.stack([(height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w], axis=1)


def erase_noise(key: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) float32 standard normal values of one erased box (timm's ``pixel``), as
    version 1 of ``run.draws`` draws them; the newer way is in ``erasing.py``."""
    generator = np.random.Generator(np.random.Philox(key=int(key)))
    return generator.standard_normal((height, width, 3), dtype=np.float32)


def erase_values(boxes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(sum of height · width, 3) float32: the new pixels of erased ``boxes`` (n, 4), in order."""
    patches = [
        erase_noise(key, height, width).reshape(-1, 3)
        for key, (_, _, height, width) in zip(keys.tolist(), boxes.tolist(), strict=True)
        if height
    ]
    return np.concatenate(patches) if patches else np.zeros((0, 3), np.float32)
