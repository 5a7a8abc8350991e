"""The settings of a training run, pre-training and fine-tuning alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from l2vit.data.config import AugmentConfig, DataConfig, EvalConfig
from l2vit.errors import ConfigError


@dataclass
class AboutConfig:
    """What a recipe reproduces; read by people and by the README's table."""

    paper: str = ""
    """The paper's row."""
    expected: str = ""
    """The published or measured result."""
    command: str = ""
    """The exact command."""


@dataclass
class RunConfig:
    dir: str
    """Run directory; the same command on the same directory continues the run."""
    seed: int = 0
    resume: str = ""
    """Another run directory or checkpoint to continue exactly; this run's own comes first."""


@dataclass
class ModelConfig:
    name: str
    """A name timm knows after ``import l2vit``."""
    drop_path_rate: float = 0.0
    window_size: int = 7
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's constructor."""


@dataclass
class InitConfig:
    """Where the first weights come from when there is nothing to continue."""

    source: str = ""
    """A run directory, a checkpoint in one, an exported directory, or a released file."""
    weights: Literal["auto", "raw", "ema"] = "auto"
    """auto takes the EMA where there is one."""
    head: Literal["auto", "keep", "slice", "fresh"] = "auto"
    """keep takes the source's head whole and refuses another class hash; slice keeps the rows of
    classes both label sets know; auto: keep if the class hashes are equal, slice if wnids
    overlap, else fresh."""


@dataclass
class OptimConfig:
    lr: float = 1e-3
    """Peak learning rate, taken as given: not scaled with the batch."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: parameters of two dimensions and more, or norms and biases too."""
    layer_decay: float = 1.0
    clip_grad: float = 0.0
    """Largest global L2 norm of the gradient; 0 for no clipping."""

    def validate(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr: {self.lr} must be positive")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay: {self.layer_decay} is not in (0, 1]")
        if self.clip_grad < 0 or self.weight_decay < 0:
            raise ConfigError("clip_grad and weight_decay must not be negative")


@dataclass
class ScheduleConfig:
    """Durations are a number and a unit: ``90 epochs``, ``310800 steps``, ``1e6 images``."""

    global_batch: int
    """Images per optimizer step over all ranks; micro-batch and accumulation follow from it."""
    length: str = "90 epochs"
    warmup: str = "5 epochs"
    cooldown: str = "0 epochs"
    """Steps at ``min_lr`` after the cosine's end."""
    start_lr: float = 0.0
    min_lr: float = 1e-6
    shape: Literal["cosine", "steps", "poly"] = "cosine"
    """How the rate falls: along a cosine; by ``factor`` after each of ``steps``; or as
    (1 - share of the length) ** ``power``."""
    steps: tuple[str, ...] = ()
    factor: float = 0.1
    power: float = 1.0
    warmup_ratio: float = 0.0
    """Shapes steps and poly: the first step's share of the rate; the warm-up raises it to 1."""
    convention: Literal["paper", "swin"] = "paper"
    """paper: warm-up reaches the peak, then the cosine starts. swin: the cosine is counted from
    the first step and each step uses the rate of the one before (FLatten, InLine)."""

    def validate(self) -> None:
        if self.global_batch < 1:
            raise ConfigError(f"global_batch: {self.global_batch} must be at least 1")
        if self.shape == "cosine" and (self.warmup_ratio or self.steps):
            raise ConfigError("warmup_ratio and steps: not with shape cosine; use start_lr")
        if self.shape != "cosine" and (self.start_lr or self.convention != "paper"):
            raise ConfigError(f"start_lr and convention: not with shape {self.shape}")
        if (self.shape == "steps") != bool(self.steps):
            raise ConfigError("steps: give durations such as [8 epochs, 11 epochs] to shape steps")
        if not 0 <= self.warmup_ratio <= 1 or self.factor < 0 or self.power < 0:
            raise ConfigError("warmup_ratio must be in [0, 1], factor and power not negative")


@dataclass
class EngineConfig:
    zero_stage: Literal[1, 2, 3] = 1
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    micro_batch: int = 0
    """Images per rank and backward pass; 0 means the whole share of a rank at once."""
    auto_micro_batch: bool = True
    """Out of memory in the first step: halve the micro-batch and double the accumulation."""
    grad_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = True


@dataclass
class EmaConfig:
    decay: float = 0.0
    """0 for no EMA; constant, applied once per optimizer step."""

    def validate(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay: {self.decay} is not in [0, 1)")


@dataclass
class CheckpointConfig:
    every: str = "1 epochs"
    keep_last: int = 2
    keep_every: str = ""
    """Checkpoints at multiples of this duration are kept for good; empty for none."""
    background: bool = True
    """Copy to host memory, then write while training goes on."""
    max_failures: int = 3
    """Saves that may fail in a row (a full disk) before the run stops."""


@dataclass
class FaultsConfig:
    max_nonfinite: int = 10
    """Optimizer steps in a row that may be skipped for a non-finite loss or gradient."""
    hang_seconds: float = 600.0
    """A rank that makes no progress for so long is named and the run stopped; 0 for never."""
    spike_factor: float = 0.0
    """A loss above so many times its running median rolls back to the last checkpoint and skips
    those samples; 0 for never."""


@dataclass
class LogConfig:
    every: int = 50
    """Optimizer steps between records."""
    denominators_every: int = 0
    """Steps between histograms of the linear attention's denominators; 0 for never."""
    profile_steps: tuple[int, ...] = ()
    """First and last step of a torch.profiler window."""
    peak_tflops: float = 0.0
    """The device's peak for model FLOP utilisation; 0 looks the device up."""


@dataclass
class TrainConfig:
    """Everything a run needs; saved resolved as ``config.yaml`` in the run directory."""

    run: RunConfig
    model: ModelConfig
    schedule: ScheduleConfig
    task: str = "classify"
    """What is learned (``l2vit.train.tasks``); other tasks have sections of their own."""
    about: AboutConfig = field(default_factory=AboutConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    log: LogConfig = field(default_factory=LogConfig)
