"""Making the network of a run, and finding a micro-batch that fits into memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import nn

from l2vit.data.config import EvalConfig
from l2vit.data.order import Split, halve, possible
from l2vit.errors import ConfigError
from l2vit.models.backbone import Backbone
from l2vit.train import precision
from l2vit.train.config import EngineConfig, ModelConfig, TrainConfig
from l2vit.train.distributed import World

TrialLoss = Callable[[nn.Module, int, torch.device], torch.Tensor]
"""(network, images, device) -> the loss of a made-up micro-batch."""

LARGEST_TRIED = 512
"""Images the memory trial starts with at most: a GPU is busy long before, and from 1,024 on
attention over windows asks for grids that are refused."""
_LAUNCH_ERRORS = ("AcceleratorError", "OutOfResources")
_LAUNCH_SIGNS = ("CUDA error", "CUDA driver error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS")


def from_config(config: TrainConfig, *, classes: int) -> nn.Module:
    """The network of a run, see `create`; from draws 2 on, drop path is drawn for all blocks at
    once by the networks that can."""
    network = create(
        config.model,
        classes=classes,
        input_size=config.data.input_size,
        seed=config.run.seed,
        grad_checkpointing=config.engine.grad_checkpointing,
    )
    if isinstance(network, Backbone):
        network.draws_paths_at_once = config.run.draws != 1
    return network


def create(
    model: ModelConfig,
    *,
    classes: int,
    input_size: int,
    seed: int,
    grad_checkpointing: bool = False,
) -> nn.Module:
    """A timm model with fresh weights, the same for the same ``seed``.

    ``window_size`` and ``img_size`` are passed to models that take them.

    Raises:
        ConfigError: timm knows no such model, or it refuses an argument.
    """
    import l2vit  # noqa: F401  registers our models with timm

    if model.name not in timm.list_models():
        close = timm.list_models(f"*{model.name.split('_')[0]}*")[:5]
        hint = f"; similar: {', '.join(close)}" if close else ""
        raise ConfigError(f"model.name: timm knows no {model.name!r}{hint}")
    given = {"num_classes": classes, "drop_path_rate": model.drop_path_rate, **model.args}
    optional = {"window_size": model.window_size, "img_size": input_size}
    try:
        network, _ = build_with_accepted(model.name, given, optional, seed=seed)
    except TypeError as error:
        raise ConfigError(f"model.args: {model.name}: {error}") from None
    except (ValueError, AssertionError) as error:  # an unknown pool is an assertion of timm's
        raise ConfigError(f"model: {model.name} cannot be built so: {error}") from None
    if grad_checkpointing:
        _checkpoint_gradients(network, model.name)
    return network


def build_with_accepted(
    name: str, given: Mapping[str, Any], optional: Mapping[str, Any], *, seed: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a timm model, leaving out those of the ``optional`` arguments that it does not take.

    Args:
        name: the model's name.
        given: arguments it must take; they come before optional ones of the same name.
        optional: arguments it may take.
        seed: of the weights.

    Returns:
        The model and the arguments it was built with.

    Raises:
        TypeError: it does not take one that is given.
    """
    arguments = {**optional, **given}
    while True:
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return timm.create_model(name, **arguments), arguments
        except TypeError as error:
            left = (key for key in arguments if key in optional and key not in given)
            refused = next((key for key in left if f"'{key}'" in str(error)), None)
            if refused is None:
                raise
            del arguments[refused]


def check_evaluation_sizes(
    network: nn.Module, evaluation: EvalConfig, *, name: str, input_size: int
) -> None:
    """Refuse now, not at the first evaluation, a size that a model of fixed size cannot take.

    Raises:
        ConfigError: names the evaluation set.
    """
    for label, extra in evaluation.extra.items():
        if extra.input_size in (0, input_size):
            continue
        shapes_only = copy.deepcopy(network).to("meta").eval()
        try:
            shapes_only(torch.empty(1, 3, extra.input_size, extra.input_size, device="meta"))
        except (ValueError, AssertionError) as error:  # what models raise for their input's size
            raise ConfigError(
                f"eval.extra.{label}.input_size: {name} built for {input_size} pixels cannot take"
                f" {extra.input_size}: {error}"
            ) from None


def _checkpoint_gradients(network: nn.Module, name: str) -> None:
    try:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise ConfigError(f"engine.grad_checkpointing: {name} cannot; set it to false") from None


def probes_memory(world: World) -> bool:
    """True where running out of memory is an error; without a GPU the system kills the process."""
    return world.device.type == "cuda"


def fit_micro_batch(
    network: nn.Module,
    trial_loss: TrialLoss,
    split: Split,
    *,
    world: World,
    engine: EngineConfig,
    averages: bool,
    multiple_of: int,
) -> Split:
    """Halve the micro-batch until one forward and backward pass fits, on every rank.

    The pass runs on a copy of the network, beside as much memory as the engine's fp32 state will
    take, and without any communication, so that ranks cannot wait for one that ran out.

    Args:
        network: stays as it is.
        trial_loss: computes the loss of so many images (``Task.trial_loss``).
        split: to begin with.
        world: this rank's place.
        engine: precision and ZeRO stage decide how much memory is taken.
        averages: the run keeps a moving average.
        multiple_of: what must divide the micro-batch.

    Raises:
        ConfigError: even the smallest possible micro-batch does not fit.
    """
    trial = _Trial(network, trial_loss, engine, averages, world)
    split = _at_most(LARGEST_TRIED, split, multiple_of=multiple_of)
    while True:
        failure = trial.failure(split.micro_batch)
        if world.max(float(bool(failure))) == 0:
            return split
        failure = failure or "another rank"
        smaller = halve(split, multiple_of=multiple_of)
        if smaller is None:
            raise ConfigError(
                f"engine.micro_batch: out of memory even with {split.micro_batch} images"
                f" ({failure}); set engine.grad_checkpointing=true or engine.zero_stage=3,"
                " or use more GPUs"
            )
        if world.main:
            print(
                f"out of memory with micro-batch {split.micro_batch} ({failure}): trying"
                f" {smaller.micro_batch} × accumulation {smaller.accumulation}",
                flush=True,
            )
        split = smaller


def _at_most(images: int, split: Split, *, multiple_of: int) -> Split:
    """The largest division with no more images in a micro-batch; ``split`` where there is none."""
    options = possible(split.global_batch, world=split.world, multiple_of=multiple_of)
    return next((o for o in options if o.micro_batch <= min(images, split.micro_batch)), split)


class _Trial:
    """Tries passes on copies of a network, in the memory that training will leave."""

    def __init__(
        self,
        network: nn.Module,
        trial_loss: TrialLoss,
        engine: EngineConfig,
        averages: bool,
        world: World,
    ) -> None:
        self._network, self._loss, self._device = network, trial_loss, world.device
        self._dtype = precision.DTYPES[engine.precision]
        self._held = _state_bytes(network, engine, averages, world.size)

    def failure(self, images: int) -> str:
        """Why a pass with so many images failed for its size; empty if it fits."""
        try:
            self._pass(images)
            return ""
        except Exception as error:
            if not _is_too_large(error):
                raise
            return str(error).strip().splitlines()[0][:120]
        finally:
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _pass(self, images: int) -> None:
        """One forward and backward pass on a copy; what it holds is free again on return."""
        state = torch.empty(self._held, dtype=torch.uint8, device=self._device)
        twin = copy.deepcopy(self._network).to(self._device).train()
        precision.cast(twin, self._dtype)
        self._loss(twin, images, self._device).backward()
        del state


def _is_too_large(error: Exception) -> bool:
    """True if memory, or the largest grid a kernel can have, ran out: what launches raise."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    name, text = type(error).__name__, str(error)
    return name in _LAUNCH_ERRORS or any(sign in text for sign in _LAUNCH_SIGNS)


def _state_bytes(network: nn.Module, engine: EngineConfig, averages: bool, world: int) -> int:
    """Bytes of the engine's fp32 state on one rank: masters, moments, average, gradients."""
    parameters = sum(p.numel() for p in network.parameters())
    kinds = 3 + averages
    gradients = parameters if engine.zero_stage == 1 else parameters // world
    return 4 * (kinds * parameters // world + gradients)
