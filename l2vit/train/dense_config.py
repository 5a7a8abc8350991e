"""The settings of a detection or segmentation run; reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from l2vit.dense.config import (
    CocoConfig,
    DetectAugmentConfig,
    DetectEvalConfig,
    DetectorConfig,
    ScenesConfig,
    SegmentAugmentConfig,
    SegmentEvalConfig,
    SegmentorConfig,
)
from l2vit.errors import ConfigError
from l2vit.train.config import TrainConfig


@dataclass
class DetectConfig(TrainConfig):
    """Everything a detection run needs."""

    model: DetectorConfig  # type: ignore[assignment]
    task: str = "detect"
    data: CocoConfig = field(default_factory=CocoConfig)  # type: ignore[assignment]
    augment: DetectAugmentConfig = field(  # type: ignore[assignment]
        default_factory=DetectAugmentConfig
    )
    eval: DetectEvalConfig = field(default_factory=DetectEvalConfig)  # type: ignore[assignment]

    def validate(self) -> None:
        if self.engine.zero_stage == 3:
            raise ConfigError(
                "engine.zero_stage: 3 gathers weights call by call and would hang where a rank has"
                " no box; detection runs with 1 and 2"
            )


@dataclass
class SegmentConfig(TrainConfig):
    """Everything a segmentation run needs."""

    model: SegmentorConfig  # type: ignore[assignment]
    task: str = "segment"
    data: ScenesConfig = field(default_factory=ScenesConfig)  # type: ignore[assignment]
    augment: SegmentAugmentConfig = field(  # type: ignore[assignment]
        default_factory=SegmentAugmentConfig
    )
    eval: SegmentEvalConfig = field(default_factory=SegmentEvalConfig)  # type: ignore[assignment]
