"""Settings of the data a run reads and of what is done to each picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from l2vit.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class SubsetConfig:
    """Train on part of a manifest without rewriting shards; settings combine (all must admit)."""

    classes: str = ""
    """File with one class identifier a line; empty means all classes. Labels keep their numbers."""
    fraction: float = 1.0
    """Share of the samples kept, chosen by a hash of the sample id and the seed."""
    exclude: str = ""
    """File with one sample key a line, to be left out."""

    def validate(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction: {self.fraction} is not in (0, 1]")


@dataclass
class DataConfig:
    """Where samples come from and what reads them."""

    train: str = ""
    """Shard directory to train on."""
    val: str = ""
    """Shard directory to evaluate on."""
    backend: Literal["dali", "host"] = "dali"
    input_size: int = 224
    threads: int = 4
    """Decoding threads (dali) or worker processes (host) per rank; 0 works in the main process
    (host)."""
    prefetch: int = 2
    """Batches made ready ahead of the one in use; in each worker process (host)."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs for the hardware decoder of a GPU that has one (dali)."""
    chunk: int = 256
    """Samples read in a run from one shard: larger suits network disks, smaller mixes better."""
    max_bad_samples: int = 100
    """Unreadable samples replaced by good ones before the run stops."""
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    stream: str = ""
    """Read training shards front to back from here (host backend), {shard} standing for a name:
    ``s3://bucket/train/{shard}``, ``https://…``, ``pipe:…``. ``train`` then needs to hold only
    manifest.json. Weaker guarantees: docs/augmentation.md."""
    stream_buffer: int = 1000
    """Samples each worker picks from at random when streaming."""

    def validate(self) -> None:
        for name in ("input_size", "prefetch", "chunk", "stream_buffer"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be at least 1")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ConfigError(f"hw_decoder_load: {self.hw_decoder_load} is not in [0, 1]")
        if self.max_bad_samples < 0:
            raise ConfigError(f"max_bad_samples: {self.max_bad_samples} must not be negative")
        if self.stream:
            self._validate_stream()
        if self.threads < 0 or (self.threads == 0 and self.backend == "dali"):
            raise ConfigError(f"threads: {self.threads} is too few for backend {self.backend}")

    def _validate_stream(self) -> None:
        if "{shard}" not in self.stream:
            raise ConfigError(f"stream: {self.stream} must hold {{shard}}, the place of the name")
        if self.backend != "host":
            raise ConfigError("stream: only backend host streams")
        if self.subset != SubsetConfig():
            raise ConfigError("stream: a subset needs indexed shards")


@dataclass
class AugmentConfig:
    """Training augmentation in timm's terms (paper Table 9)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop."""
    hflip: float = 0.5
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment string; empty for none. It replaces colour jitter."""
    color_jitter: float = 0.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    erase_prob: float = 0.25
    """Random erasing with one normal value per pixel (timm's mode ``pixel``)."""
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_switch_prob: float = 0.5
    """Chance of cutmix where both are on."""
    mix_group: int = 2
    """Samples that share one mixing draw, mirrored within the group as timm's batch mode does in
    a batch. Must divide the micro-batch, so that a group never spans ranks."""
    mix_off_epochs: float = 0.0
    """Mixup and cutmix off for the last so many epochs."""
    label_smoothing: float = 0.1
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def validate(self) -> None:
        for name in ("hflip", "erase_prob", "mix_switch_prob", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not a probability in [0, 1]")
        for name in ("mixup", "cutmix", "mix_off_epochs", "color_jitter"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: {getattr(self, name)} must not be negative")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"{name}: [{low}, {high}] is not an increasing positive range")
        if self.mix_group < 2 or self.mix_group % 2:
            raise ConfigError(f"mix_group: {self.mix_group} must be even and at least 2")


@dataclass
class EvalSetConfig:
    """One evaluation set; unset sizes and crops are those of the section above."""

    data: str
    input_size: int = 0
    crop_fraction: float = 0.0

    def validate(self) -> None:
        if self.crop_fraction and not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"crop_fraction: {self.crop_fraction} is not in (0, 1]")


@dataclass
class EvalConfig:
    every: str = "1 epochs"
    batch: int = 64
    """Images per rank and forward pass."""
    crop_fraction: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"
    extra: dict[str, EvalSetConfig] = field(default_factory=dict)
    """Further sets by name; the main one is ``data.val``, named val."""

    def validate(self) -> None:
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"crop_fraction: {self.crop_fraction} is not in (0, 1]")
        if self.batch < 1:
            raise ConfigError(f"batch: {self.batch} must be at least 1")
