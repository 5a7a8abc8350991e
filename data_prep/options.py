"""What a build is asked to do; the part of it that decides the bytes of the result."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.names import escaped
from l2vit.errors import ConfigError

DEFAULT_VAL_FRACTION = 0.1
"""Of a ``folder`` source that has no validation part."""


@dataclass(frozen=True)
class Rules:
    """When an image is passed on, repaired, or left out."""

    min_side: int = 32
    """Shorter sides are left out (pixels)."""
    max_pixels: int = 100_000_000
    """More pixels are left out unread: a decompression bomb, or no photograph."""
    max_bytes: int = 64 << 20
    """Larger members, and members that unpack to more, are left out."""
    max_short_side: int = 0
    """Larger short sides are reduced to this many pixels and re-encoded; 0: never."""
    format: str = "jpeg"
    """``jpeg``, or ``webp`` (every image is then re-encoded)."""
    quality: int = 95
    exif: str = "apply"
    """``apply`` turns the pixels upright as the EXIF tag says; ``keep`` ignores the tag."""
    perceptual: bool = False
    """Compute the perceptual hash; only the leakage guard's near copies need it."""

    def validate(self) -> None:
        """Raise ConfigError for values that cannot be meant."""
        if self.format not in ("jpeg", "webp"):
            raise ConfigError(f"--format {self.format}: jpeg or webp")
        if self.exif not in ("apply", "keep"):
            raise ConfigError(f"--exif {self.exif}: apply or keep")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality} is not in 1 … 100")
        if not 0 < self.max_bytes < 1 << 32:
            raise ConfigError(f"--max-bytes {self.max_bytes} is not between 1 and 4G")
        for name in ("min_side", "max_short_side"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} must not be negative")
        if 0 < self.max_short_side < self.min_side:
            raise ConfigError("--max-short-side is below --min-side: nothing would be left")

    @property
    def extension(self) -> str:
        """Of the image members."""
        return "jpg" if self.format == "jpeg" else "webp"


@dataclass(frozen=True)
class Options:
    """One build. All but ``out`` and ``workers`` decide the result."""

    dataset: str
    sources: tuple[str, ...]
    out: Path
    split: str = ""
    """``""`` all images as train, or for ``folder`` the parts of the source (OUT/train, OUT/val,
    OUT/test); ``train`` or ``val`` that part (without a rule below: the source is that part);
    ``both`` writes OUT/train and OUT/val."""
    classes: str = "auto"
    """``auto`` by the set of classes found; ``found``; a layout's name; or a file, one a line."""
    val_fraction: float = 0.0
    val_per_class: int = 0
    val_first_per_class: int = 0
    min_class_images: int = 0
    val_labels: str = ""
    seed: int = 0
    shard_bytes: int = 1 << 30
    shard_samples: int = 0
    exclude: tuple[str, ...] = ()
    exclude_distance: int = 0
    gather: bool = False
    """Copy each shard's images together first; changes no byte of the result."""
    rules: Rules = Rules()
    workers: int = 1

    def validate(self) -> None:
        """Raise ConfigError for contradictions."""
        self.rules.validate()
        if sum(self._val_rules) > 1:
            raise ConfigError(
                "give one of --val-fraction, --val-per-class and --val-first-per-class, not two"
            )
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"--val-fraction {self.val_fraction} is not in [0, 1)")
        if self.has_val_rule and not self.split and not self.finds_parts:
            raise ConfigError("a validation rule needs --split train, val or both")
        if self.split == "both" and not self.has_val_rule and self.dataset == "imagenet22k":
            raise ConfigError(
                "--split both needs a rule: --val-fraction F, --val-per-class N or"
                " --val-first-per-class N (there is no official validation part)"
            )
        for name in ("val_per_class", "val_first_per_class", "min_class_images", "shard_samples"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} must not be negative")
        if self.shard_bytes < 1 << 16:
            raise ConfigError("--shard-bytes below 64 KiB would hold no photograph")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers} must be at least 1")
        if self.exclude_distance and not self.rules.perceptual:
            raise ConfigError("exclude_distance needs rules with perceptual hashes")
        if not 0 <= self.exclude_distance <= 6:
            raise ConfigError(f"--exclude-distance {self.exclude_distance} is not in 0 … 6")
        self._require_out_beside_sources()

    def _require_out_beside_sources(self) -> None:
        """Shards among the images would be read as images by the next build."""
        out = self.out.resolve()
        for source in self.sources:
            path = Path(source).resolve()
            if out == path or (path.is_dir() and path in out.parents):
                raise ConfigError(
                    f"--out {escaped(str(self.out))} is {'' if out == path else 'inside '}--source"
                    f" {escaped(source)}: give a directory beside it"
                )

    @property
    def _val_rules(self) -> tuple[bool, bool, bool]:
        return self.val_fraction > 0, self.val_per_class > 0, self.val_first_per_class > 0

    @property
    def has_val_rule(self) -> bool:
        """True if a rule was given that takes the validation part out of the training part."""
        return any(self._val_rules)

    @property
    def finds_parts(self) -> bool:
        """True if the source decides which parts are written."""
        return self.dataset == "folder" and not self.split

    @property
    def takes_default_rule(self) -> bool:
        """True if a source without a validation part is split by the default rule."""
        return self.dataset == "folder" and self.split in ("", "both") and not self.has_val_rule

    def val_by_rule(self, named: Set[str]) -> bool:
        """True if a rule chooses the validation part of a source whose own parts are ``named``."""
        return self.has_val_rule or (self.takes_default_rule and "val" not in named)

    def parts(self, named: Set[str]) -> tuple[str, ...]:
        """Parts to write of a source whose own parts are ``named``."""
        if self.finds_parts:
            return ("train", "val", "test") if "test" in named else ("train", "val")
        return {"": ("train",), "both": ("train", "val")}.get(self.split, (self.split,))

    def resolved(self, named: Set[str]) -> Options:
        """These options with the default rule written in where it applies."""
        if self.takes_default_rule and self.val_by_rule(named):
            return replace(self, val_fraction=DEFAULT_VAL_FRACTION)
        return self

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON."""
        values = asdict(self)
        for name in ("out", "workers", "gather", "sources"):
            del values[name]
        return {"sources": list(self.sources), **values, "exclude": list(self.exclude)}

    @classmethod
    def from_identity(cls, identity: dict[str, Any], out: Path) -> Options:
        """The options a finished build recorded."""
        values = {**identity, "rules": Rules(**identity["rules"])}
        for name in ("sources", "exclude"):
            values[name] = tuple(values[name])
        return cls(out=out, **values)

    def split_rule(self) -> str:
        """How the validation part is chosen, in one recorded line."""
        if self.val_fraction:
            return f"hash of key and seed {self.seed} below {self.val_fraction}"
        if self.val_per_class:
            return f"the {self.val_per_class} lowest hashes of key and seed {self.seed} per class"
        if self.val_first_per_class:
            return f"the first {self.val_first_per_class} images of each class in archive order"
        return "the source's own part" if self.split or self.finds_parts else "none"
