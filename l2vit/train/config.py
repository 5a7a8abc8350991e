"""The settings of a training run, pre-training and fine-tuning alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from l2vit.config.values import (
    Count,
    CountOrZero,
    DurationOrEmpty,
    DurationText,
    NotNegative,
    Positive,
    PositiveShare,
    Share,
    ShareBelow1,
    Text,
)
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
    recipe_batch: CountOrZero = 0
    """The recipe's global batch where the command line gives another one; 0 where it does not."""


@dataclass
class RunConfig:
    dir: Text
    """Run directory; the same command on the same directory continues the run."""
    seed: CountOrZero = 0
    """Of first weights, order, augmentation, mixing and drop path."""
    draws: Literal[0, 1, 2] = 0
    """Version of the random draws made of the seed: 0 takes the newest for a new run, and for a
    continued one the version it began with. 2 draws the noise of erased boxes on the device, by
    the formula in ``l2vit/data/erasing.py``, and L²ViT's drop path for all blocks at once; 1 drew
    the noise on the host and each block's drop path by itself."""
    resume: str = ""
    """Another run directory or checkpoint to continue exactly; this run's own comes first."""


@dataclass
class ModelConfig:
    name: Text
    """A name timm knows after ``import l2vit``."""
    drop_path_rate: ShareBelow1 = 0.0
    """Rate of stochastic depth in the last block; it grows linearly from 0 in the first."""
    window_size: Count = 7
    """Height and width of the windows of local attention, in tokens."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's constructor."""


@dataclass
class InitConfig:
    """Where the first weights come from when there is nothing to continue."""

    source: str = ""
    """A run directory, a checkpoint in one, an exported directory, or a file of weights: released
    by a network's authors, of timm's train.py, or of any timm model."""
    weights: Literal["auto", "raw", "ema"] = "auto"
    """auto takes the raw weights or the EMA, whichever was better on ``data.val`` at the
    checkpoint's very step; the EMA where that was not measured."""
    head: Literal["auto", "keep", "slice", "fresh"] = "auto"
    """keep takes the source's head whole and refuses another class hash; slice keeps the rows of
    classes both label sets know; auto: keep if the class hashes are equal, slice if wnids
    overlap, else fresh."""


@dataclass
class OptimConfig:
    """AdamW."""

    train: Literal["all", "head"] = "all"
    """What learns: all, or the classifier alone (a linear probe), with BatchNorm's statistics
    kept and nothing dropped below it."""
    lr: Positive = 1e-3
    """Peak learning rate: of batches of ``lr_batch`` images, or as it is if that is 0."""
    lr_batch: CountOrZero = 0
    """The global batch that the rates (peak, start, lowest) are for: they are multiplied by the
    square root of schedule.global_batch over it. 0: they are taken as they are, as they also are
    when ``optim.lr`` is given on the command line without this."""
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: NotNegative = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: NotNegative = 0.05
    """Pull of the weights towards zero, times the learning rate."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: parameters of two dimensions and more, or norms and biases too."""
    layer_decay: PositiveShare = 1.0
    """Factor of the learning rate from each layer to the one below it; 1: the same in all."""
    clip_grad: NotNegative = 0.0
    """Largest global L2 norm of the gradient; 0 for no clipping."""

    def scale(self, global_batch: int) -> float:
        """The factor on every rate for this batch."""
        return (global_batch / self.lr_batch) ** 0.5 if self.lr_batch else 1.0


@dataclass
class ScheduleConfig:
    """Durations are a number and a unit: ``90 epochs``, ``310800 steps``, ``1e6 images``."""

    global_batch: Count
    """Images per optimizer step over all ranks; micro-batch and accumulation follow from it."""
    length: DurationText = "90 epochs"
    """Of warm-up and cosine together."""
    warmup: DurationText = "5 epochs"
    """Linear rise of the learning rate from ``start_lr`` to the peak, ``optim.lr``."""
    cooldown: DurationText = "0 epochs"
    """Steps at ``min_lr`` after the cosine's end."""
    start_lr: NotNegative = 0.0
    """Learning rate of the first step."""
    min_lr: NotNegative = 1e-6
    """Learning rate at the cosine's end."""
    shape: Literal["cosine", "steps", "poly"] = "cosine"
    """How the rate falls: along a cosine; by ``factor`` after each of ``steps``; or as
    (1 - share of the length) ** ``power``."""
    steps: tuple[DurationText, ...] = ()
    """When the rate falls (shape steps), such as [8 epochs, 11 epochs]."""
    factor: NotNegative = 0.1
    """By which the rate is multiplied then (shape steps)."""
    power: NotNegative = 1.0
    """Of the remaining share of the length (shape poly)."""
    warmup_ratio: Share = 0.0
    """Shapes steps and poly: the first step's share of the rate; the warm-up raises it to 1."""
    convention: Literal["paper", "swin"] = "paper"
    """paper: warm-up reaches the peak, then the cosine starts. swin: the cosine is counted from
    the first step and each step uses the rate of the one before (FLatten, InLine)."""

    def validate(self) -> None:
        if self.shape == "cosine" and (self.warmup_ratio or self.steps):
            raise ConfigError("warmup_ratio and steps: not with shape cosine; use start_lr")
        if self.shape != "cosine" and (self.start_lr or self.convention != "paper"):
            raise ConfigError(f"start_lr and convention: not with shape {self.shape}")
        if (self.shape == "steps") != bool(self.steps):
            raise ConfigError("steps: give durations such as [8 epochs, 11 epochs] to shape steps")


@dataclass
class EngineConfig:
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed's ZeRO: 1 shards optimizer state over the ranks, 2 gradients too, 3 parameters
    too."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Of forward and backward; master weights, sums of gradients and optimizer state are fp32."""
    micro_batch: CountOrZero = 0
    """Images per rank and backward pass; 0 means the whole share of a rank at once."""
    auto_micro_batch: bool = True
    """Out of memory in the first step: halve the micro-batch and double the accumulation."""
    grad_checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass: less memory, more time."""
    compile: bool | Literal["auto"] = "auto"
    """Run the model through ``torch.compile``. auto: on a GPU if it makes one graph of the network
    and is faster there, as timed before training; kept with the run like ``kernels``."""
    kernels: Text = "auto"
    """Which form of each operation runs. auto: on a GPU each is timed once at the run's shapes and
    the fastest right one is taken by all ranks and kept in the run's kernels.json; on a CPU fixed
    rules choose. timed: so on any device. rules: never timed. Else a kernels.json to take the
    choice from."""
    channels_last: bool = True
    """Keep images in the memory layout NHWC. Weights lie in ZeRO's flat tensors as they are."""
    bucket: CountOrZero = 0
    """Elements of the gradient that are summed over the ranks at once. ZeRO-2 and 3: 0 for all, up
    to 500 M; with ``overlap`` several must fit into the model: 25_000_000, say. ZeRO-1 in bf16 has
    buckets with ``overlap`` only: 0 for 25 M."""
    overlap: bool = False
    """Sum full buckets while the backward pass goes on. At ZeRO-2 and 3 DeepSpeed then waits for
    the device at the end of each backward pass; at ZeRO-1 in bf16 nothing waits, and only the
    step's last backward pass sums. A compiled model gives all gradients at its end, which leaves
    nothing to overlap."""
    tf32: bool = False
    """fp32 runs on a GPU: let products and convolutions round their inputs to TF32."""


@dataclass
class EmaConfig:
    """Exponential moving average of the weights."""

    decay: ShareBelow1 = 0.0
    """0 for no EMA; applied once per optimizer step."""
    warmup: bool = False
    """After t steps the decay is at most (1 + t) / (10 + t), so that the average of a short run
    leaves the first weights behind."""


@dataclass
class CheckpointConfig:
    every: DurationOrEmpty = "1 epochs"
    """Between saves; empty for only one at the end."""
    keep_last: CountOrZero = 2
    """Newest checkpoints that are kept; 0 means 1."""
    keep_every: DurationOrEmpty = ""
    """Checkpoints at multiples of this duration are kept for good; empty for none."""
    background: bool = True
    """Copy to host memory, then write while training goes on."""
    max_failures: CountOrZero = 3
    """Saves that may fail in a row (a full disk) before the run stops."""
    mirror: str = ""
    """Address (``s3://…``) that complete checkpoints are copied to in the background; a run
    directory without any continues from the newest one there."""


@dataclass
class FaultsConfig:
    max_nonfinite: CountOrZero = 10
    """Optimizer steps in a row that may be skipped for a non-finite loss or gradient."""
    hang_seconds: NotNegative = 600.0
    """A rank that makes no progress for so long is named and the run stopped; 0 for never."""
    spike_factor: NotNegative = 0.0
    """A loss above so many times its running median rolls back to the last checkpoint and skips
    those samples; 0 for never."""

    def validate(self) -> None:
        if 0 < self.spike_factor <= 1:
            raise ConfigError(f"spike_factor: {self.spike_factor} must be 0 or above 1")


@dataclass
class LogConfig:
    every: CountOrZero = 50
    """Optimizer steps between records; 0 for only the first step and the last."""
    denominators_every: CountOrZero = 0
    """Steps between histograms of the linear attention's denominators; 0 for never."""
    histograms_every: CountOrZero = 0
    """Steps between histograms of the parameters in TensorBoard; 0 for never."""
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Where records go beside ``metrics.jsonl``. Addresses and credentials are each client's own
    business: its environment variables and files."""
    project: Text = "l2vit"
    """Name of the project (wandb, trackio) or experiment (MLflow) that runs are filed under."""
    profile_steps: tuple[Count, ...] = ()
    """First and last step of a torch.profiler window."""
    peak_tflops: NotNegative = 0.0
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

    @classmethod
    def implied(cls, tree: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
        """Overrides that follow from those given: a rate chosen for this run is not scaled."""
        given = {override.partition("=")[0] for override in overrides}
        if "optim.lr" in given:
            return [] if "optim.lr_batch" in given else ["optim.lr_batch=0"]
        batch = (tree.get("schedule") or {}).get("global_batch")
        if "schedule.global_batch" in given and isinstance(batch, int):
            return [f"about.recipe_batch={batch}"]
        return []

    def validate(self) -> None:
        if self.optim.train == "head" and self.task != "classify":
            raise ConfigError(f"optim.train: head is for classification, not task {self.task}")
        for name in ("start_lr", "min_lr"):
            rate = getattr(self.schedule, name)
            if rate > self.optim.lr:
                raise ConfigError(
                    f"schedule.{name}: {rate} is above the peak, optim.lr={self.optim.lr}"
                )
