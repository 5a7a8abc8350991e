"""Settings of the data a run reads and of what is done to each picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from l2vit.config.values import (
    Count,
    CountOrZero,
    DurationOrEmpty,
    NotNegative,
    Positive,
    PositiveShare,
    Share,
    Text,
)
from l2vit.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class SubsetConfig:
    """Train on part of a manifest without rewriting shards; settings combine (all must admit)."""

    classes: str = ""
    """File with one class identifier a line; empty means all classes. Labels keep their numbers."""
    fraction: PositiveShare = 1.0
    """Share of the samples kept, chosen by a hash of the sample id and the seed."""
    exclude: str = ""
    """File with one sample key a line, to be left out."""


@dataclass
class DataConfig:
    """Where samples come from and what reads them."""

    train: str = ""
    """Shard directory to train on, or its address (``s3://…``, ``gs://…``, ``https://…``)."""
    val: str = ""
    """Shard directory to evaluate on, or its address; empty for no evaluation."""
    cache_dir: str = ""
    """Directory on a local disk that shards are read through: needed for an address, worthwhile
    for a slow file system. The ranks of a node share it."""
    cache_gib: Positive = 100.0
    """Most the cache holds; the least recently used goes first."""
    backend: Literal["auto", "pil", "dali", "host"] = "auto"
    """pil: worker processes, timm's pixels. dali: one graph, for GPUs. auto: dali on a GPU, else
    pil. host is pil's former name."""
    input_size: Count = 224
    """Height and width of the training images in pixels, and of the evaluation's."""
    threads: CountOrZero = 4
    """Decoding threads (dali) or worker processes (pil) per rank; 0 works in the main process
    (pil)."""
    prefetch: Count = 2
    """Batches made ready ahead of the one in use; in each worker process (pil)."""
    hw_decoder_load: Share = 0.65
    """Share of the JPEGs for the hardware decoder of a GPU that has one (dali)."""
    chunk: Count = 256
    """Samples read in a run from one shard: larger suits network disks, smaller mixes better."""
    max_bad_samples: CountOrZero = 100
    """Unreadable samples replaced by good ones before the run stops."""
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    stream: str = ""
    """Deprecated; an address in ``train`` keeps the order. Reads training shards front to back
    from here (pil backend), {shard} standing for a name: ``s3://bucket/train/{shard}``,
    ``pipe:…``. ``train`` then needs to hold only manifest.json."""
    stream_buffer: Count = 1000
    """Samples each worker picks from at random when streaming."""

    def validate(self) -> None:
        if self.stream:
            self._validate_stream()
        if self.threads == 0 and self.backend == "dali":
            raise ConfigError(f"threads: {self.threads} is too few for backend {self.backend}")

    def backend_on(self, device: str) -> Literal["pil", "dali"]:
        """The backend that makes batches for a ``device`` (``cuda``, ``cpu``)."""
        if self.backend == "auto":
            return "dali" if device == "cuda" and not self.stream else "pil"
        return "dali" if self.backend == "dali" else "pil"

    def _validate_stream(self) -> None:
        if "{shard}" not in self.stream:
            raise ConfigError(f"stream: {self.stream} must hold {{shard}}, the place of the name")
        if self.backend == "dali":
            raise ConfigError("stream: only backend pil streams")
        if self.subset != SubsetConfig():
            raise ConfigError("stream: a subset needs indexed shards")


@dataclass
class AugmentConfig:
    """Training augmentation in timm's terms (paper Table 9)."""

    scale: tuple[Positive, Positive] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop."""
    hflip: Share = 0.5
    """Chance of a horizontal flip."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment string; empty for none. It replaces colour jitter."""
    color_jitter: NotNegative = 0.0
    """Strength of brightness, contrast and saturation changes where ``auto_augment`` is empty."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How crops are resized."""
    erase_prob: Share = 0.25
    """Random erasing with one normal value per pixel (timm's mode ``pixel``)."""
    mixup: NotNegative = 0.8
    """Parameter of mixup's Beta distribution; 0 for no mixup."""
    cutmix: NotNegative = 1.0
    """Parameter of cutmix's Beta distribution; 0 for no cutmix."""
    mix_switch_prob: Share = 0.5
    """Chance of cutmix where both are on."""
    mix_group: int = 2
    """Samples that share one mixing draw, mirrored within the group as timm's batch mode does in
    a batch. Must divide the micro-batch, so that a group never spans ranks."""
    mix_off_epochs: NotNegative = 0.0
    """Mixup and cutmix off for the last so many epochs."""
    label_smoothing: Share = 0.1
    """Probability spread evenly over all classes in the targets."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from the pixels (RGB, 0 to 1)."""
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    """By which the pixels are divided after that."""

    def validate(self) -> None:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ConfigError(f"{name}: [{low}, {high}] is not an increasing positive range")
        if self.mix_group < 2 or self.mix_group % 2:
            raise ConfigError(f"mix_group: {self.mix_group} must be even and at least 2")


@dataclass
class EvalSetConfig:
    """One evaluation set; unset sizes and crops are those of the section above."""

    data: Text
    """Shard directory."""
    input_size: CountOrZero = 0
    """Height and width of the images in pixels; 0 as ``data.input_size``."""
    crop_fraction: Share = 0.0
    """Side of the centre crop as a share of the resized image; 0 as ``eval.crop_fraction``."""


@dataclass
class EvalConfig:
    every: DurationOrEmpty = "1 epochs"
    """Between evaluations; empty for only one at the end."""
    batch: Count = 64
    """Images per rank and forward pass."""
    crop_fraction: PositiveShare = 0.875
    """Side of the centre crop as a share of the resized image."""
    crop_mode: Literal["center", "squash"] = "center"
    """center resizes the short side and crops; squash resizes both sides, whatever the shape."""
    extra: dict[str, EvalSetConfig] = field(default_factory=dict)
    """Further sets by name; the main one is ``data.val``, named val."""
