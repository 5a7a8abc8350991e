"""Mixup, cutmix and label smoothing on a batch, the same at any world size.

timm draws one number for a whole batch of a rank, so what a sample is mixed with depends on the
number of ranks. Here ``mix_group`` neighbours of the global sequence share a draw and are mixed
with one another in mirrored order; the draw is a pure function of (seed, epoch, group).
Zhang et al. 2018 (mixup), Yun et al. 2019 (cutmix), with timm's box and its corrected weight.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betaincinv

from l2vit.data import erasing
from l2vit.data.batch import Batch, BatchPlan, DecodedBatch, Normalizer, in_bytes
from l2vit.data.config import AugmentConfig
from l2vit.data.device import check_passes, upload
from l2vit.data.rng import derive_key, uniforms
from l2vit.errors import ConfigError


@dataclass(frozen=True)
class MixParams:
    """How n samples are mixed with their partners."""

    partners: np.ndarray
    """(n,) int64: place in the batch of each sample's partner."""
    weights: np.ndarray
    """(n,) float64: share of the sample itself in its target."""
    cut: np.ndarray
    """(n,) bool: cutmix, else mixup."""
    boxes: np.ndarray
    """(n, 4) int64: top, bottom, left, right (ends excluded) that cutmix takes from the partner."""

    def table(self, erase_boxes: np.ndarray | None, erase_keys: np.ndarray | None) -> np.ndarray:
        """All that ``mix_triton`` needs of each sample, (n, 13) int64: partner, bits of the weight,
        whether cut, box, erased box, the two words of its noise."""
        noise = np.zeros((len(self.partners), 6), np.int64)
        if erase_boxes is not None and erase_keys is not None:
            noise = np.concatenate([erase_boxes, erasing.words_of(erase_keys).T], axis=1)
        bits = self.weights.astype(np.float32).view(np.int32)
        return np.column_stack([self.partners, bits, self.cut, self.boxes, noise]).astype(np.int64)


class Mixer:
    """Mixes batches and makes their targets.

    Args:
        augment: strengths and smoothing.
        num_classes: width of the targets.
        seed: the run's seed.
        dtype: of images that come in bytes; others keep theirs.
    """

    def __init__(
        self,
        augment: AugmentConfig,
        *,
        num_classes: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._augment, self._classes, self._seed = augment, num_classes, seed
        self._dtype = dtype
        self._mean, self._std = in_bytes(augment.mean).tolist(), in_bytes(augment.std).tolist()

    def __call__(self, batch: Batch, *, mix: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed images and float32 targets (B, classes); ``mix`` False only smooths labels.

        Raises:
            ConfigError: the micro-batch is not made of whole mixing groups.
        """
        mix = mix and bool(self._augment.mixup or self._augment.cutmix)
        height, width = batch.images.shape[-2:]
        if mix:
            params = self.sample(batch.epoch, batch.positions, height, width)
        if batch.images.dtype == torch.uint8:
            return self._from_bytes(batch, params if mix else _unmixed(len(batch)))
        targets = self._smooth(batch.labels)
        if not mix:
            return batch.images, targets
        device = batch.images.device
        partners = upload(params.partners, device)
        cut, boxes = upload(params.cut, device), upload(params.boxes, device)
        weight = upload(params.weights.astype(np.float32), device)[:, None]
        share = _pixel_weights(weight, cut, boxes, height, width).to(batch.images.dtype)
        images = batch.images * share + batch.images[partners] * (1 - share)
        return images, targets * weight + targets[partners] * (1 - weight)

    def _from_bytes(self, batch: Batch, params: MixParams) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise, erase and mix in one pass; see ``mix_triton``."""
        from l2vit.data import mix_triton

        table = upload(params.table(batch.erase_boxes, batch.erase_keys), batch.images.device)
        images = mix_triton.mix_images(
            batch.images, table, mean=self._mean, std=self._std, dtype=self._dtype
        )
        on, off = self._smoothed()
        return images, mix_triton.mix_targets(
            batch.labels, table, classes=self._classes, on=on, off=off
        )

    def _smooth(self, labels: torch.Tensor) -> torch.Tensor:
        on, off = self._smoothed()
        targets = torch.full((len(labels), self._classes), off, device=labels.device)
        return targets.scatter_(1, labels[:, None], on)

    def _smoothed(self) -> tuple[float, float]:
        """Targets of an image's class and of every other, before mixing."""
        off = self._augment.label_smoothing / self._classes
        return 1.0 - self._augment.label_smoothing + off, off

    def sample(self, epoch: int, positions: np.ndarray, height: int, width: int) -> MixParams:
        """The mixing of the samples at ``positions`` (B,), whole groups of neighbours."""
        size = self._augment.mix_group
        places = np.arange(len(positions))
        whole = positions.reshape(-1, size) if len(positions) % size == 0 else None
        if whole is None or (whole[:, 0] % size).any() or (np.diff(whole) != 1).any():
            raise ConfigError(
                f"augment.mix_group: {size} must divide the micro-batch of {len(positions)}"
            )
        weights, cut = self._weights(epoch, whole[:, 0] // size)
        boxes, corrected = self._boxes(epoch, whole[:, 0] // size, weights, height, width)
        weights = np.where(cut, corrected, weights)
        partners = places - places % size + size - 1 - places % size
        return MixParams(
            partners,
            np.repeat(weights, size),
            np.repeat(cut, size),
            np.repeat(boxes, size, axis=0),
        )

    def _weights(self, epoch: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        augment = self._augment
        u = uniforms(derive_key("mix", self._seed, epoch), groups, 2)
        if augment.mixup and augment.cutmix:
            cut = u[:, 0] < augment.mix_switch_prob
        else:
            cut = np.full(len(u), augment.cutmix > 0)
        alpha = np.where(cut, augment.cutmix, augment.mixup)
        return betaincinv(alpha, alpha, u[:, 1]), cut  # Beta(α, α) by its inverse distribution

    def _boxes(
        self, epoch: int, groups: np.ndarray, weights: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """timm's ``rand_bbox`` and the weight that the clipped box really leaves."""
        u = uniforms(derive_key("mix box", self._seed, epoch), groups, 2)
        ratio = np.sqrt(1 - weights)
        cut_h, cut_w = (height * ratio).astype(np.int64), (width * ratio).astype(np.int64)
        y, x = (u[:, 0] * height).astype(np.int64), (u[:, 1] * width).astype(np.int64)
        top, bottom = _clipped(y, cut_h, height)
        left, right = _clipped(x, cut_w, width)
        area = (bottom - top) * (right - left)
        return np.stack([top, bottom, left, right], axis=1), 1 - area / (height * width)


@functools.cache
def kernels_agree(device: torch.device) -> bool:
    """Whether on ``device`` the Triton kernels make of bytes what ``Normalizer`` and the tensor
    operations make of them; a warning says where they do not. Asked once a device."""
    if device.type == "cpu":
        return False
    return check_passes("The Triton kernels that mix images", device, lambda: _compare(device))


def _compare(device: torch.device) -> None:
    augment, rng = AugmentConfig(), np.random.default_rng(0)
    count, side, ids = 16, 40, np.arange(16)
    pixels = torch.from_numpy(rng.integers(0, 256, (count, side, side, 3), np.uint8)).to(device)
    decoded = DecodedBatch(BatchPlan(0, 0, ids, ids), ids, ids % 5, pixels)
    decoded.erase_boxes = rng.integers(0, side // 2, (count, 4))
    decoded.erase_keys = rng.integers(0, 2**62, count).astype(np.uint64)
    mixer = Mixer(augment, num_classes=2000, seed=0)
    for mix in (True, False):
        found = []
        for bytes_only in (True, False):
            normalize = Normalizer(
                mean=augment.mean, std=augment.std, device=device, bytes_only=bytes_only
            )
            found.append(mixer(normalize(decoded), mix=mix))
        if not all(map(torch.equal, *found)):
            raise ArithmeticError("images or targets differ")


def _unmixed(count: int) -> MixParams:
    """Each sample its own partner, of weight 1."""
    boxes = np.zeros((count, 4), np.int64)
    return MixParams(np.arange(count), np.ones(count), np.zeros(count, bool), boxes)


def _clipped(centre: np.ndarray, length: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    return np.clip(centre - length // 2, 0, most), np.clip(centre + (length + 1) // 2, 0, most)


def _pixel_weights(
    weight: torch.Tensor, cut: torch.Tensor, boxes: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """(B, 1, H, W) float32: share of the sample itself in each pixel."""
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    inside_rows = (rows >= top) & (rows < bottom)
    inside_columns = (columns >= left) & (columns < right)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    share = torch.where(cut[:, None, None], (~inside).float(), weight[:, :, None])
    return share[:, None]
