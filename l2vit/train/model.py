"""Making the model of a run, and finding a micro-batch that fits into memory."""

from __future__ import annotations

import copy
import gc
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from l2vit.data.order import Split, halve, mix_group, possible
from l2vit.errors import ConfigError
from l2vit.train.config import TrainConfig
from l2vit.train.distributed import World
from l2vit.train.engine import DTYPES

LARGEST_TRIED = 512
"""Images the memory trial starts with at most: a GPU is busy long before, and from 1,024 on
attention over windows asks for grids that are refused."""
_LAUNCH_ERRORS = ("AcceleratorError", "OutOfResources")
_LAUNCH_SIGNS = ("CUDA error", "CUDA driver error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS")


def create(config: TrainConfig, *, classes: int) -> nn.Module:
    """The run's model with fresh weights, the same for the same ``run.seed``.

    ``window_size`` and ``img_size`` are passed to models that take them.

    Raises:
        ConfigError: timm knows no such model, or it refuses an argument.
    """
    import l2vit  # noqa: F401  registers our models with timm

    settings = config.model
    if settings.name not in timm.list_models():
        close = timm.list_models(f"*{settings.name.split('_')[0]}*")[:5]
        hint = f"; similar: {', '.join(close)}" if close else ""
        raise ConfigError(f"model.name: timm knows no {settings.name!r}{hint}")
    arguments: dict[str, Any] = {
        "num_classes": classes,
        "drop_path_rate": settings.drop_path_rate,
        "window_size": settings.window_size,
        "img_size": config.data.input_size,
        **settings.args,
    }
    optional = [name for name in ("window_size", "img_size") if name not in settings.args]
    while True:
        torch.manual_seed(config.run.seed)
        try:
            model = timm.create_model(settings.name, **arguments)
            break
        except TypeError as error:
            refused = next((name for name in optional if f"'{name}'" in str(error)), None)
            if refused is None:
                raise ConfigError(f"model.args: {settings.name}: {error}") from None
            optional.remove(refused)
            del arguments[refused]
        except ValueError as error:
            raise ConfigError(f"model: {settings.name} cannot be built so: {error}") from None
    if config.engine.grad_checkpointing:
        _checkpoint_gradients(model, settings.name)
    _try_evaluation_sizes(model, config)
    return model


def _try_evaluation_sizes(model: nn.Module, config: TrainConfig) -> None:
    """Refuse now, not at the first evaluation, a size that a model of fixed size cannot take."""
    for name, extra in config.eval.extra.items():
        if extra.input_size in (0, config.data.input_size):
            continue
        shapes_only = copy.deepcopy(model).to("meta").eval()
        try:
            shapes_only(torch.empty(1, 3, extra.input_size, extra.input_size, device="meta"))
        except (ValueError, AssertionError) as error:  # what models raise for their input's size
            raise ConfigError(
                f"eval.extra.{name}.input_size: {config.model.name} built for"
                f" {config.data.input_size} pixels cannot take {extra.input_size}: {error}"
            ) from None


def _checkpoint_gradients(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise ConfigError(f"engine.grad_checkpointing: {name} cannot; set it to false") from None


def probes_memory(world: World) -> bool:
    """Whether running out of memory can be tried: without a GPU the system kills the process."""
    return world.device.type == "cuda"


def fit_micro_batch(
    model: nn.Module, config: TrainConfig, split: Split, *, world: World, classes: int
) -> Split:
    """Halve the micro-batch until one forward and backward pass fits, on every rank.

    The pass runs on a copy of the model, beside as much memory as the engine's fp32 state will
    take, and without any communication, so that ranks cannot wait for one that ran out.

    Raises:
        ConfigError: even the smallest possible micro-batch does not fit.
    """
    group = mix_group(config.augment)
    split = _at_most(LARGEST_TRIED, split, multiple_of=group)
    while True:
        failure = _failure(model, config, split, world, classes)
        if world.max(float(bool(failure))) == 0:
            return split
        failure = failure or "another rank"
        smaller = halve(split, multiple_of=group)
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


def _failure(
    model: nn.Module, config: TrainConfig, split: Split, world: World, classes: int
) -> str:
    """Why a pass with this micro-batch failed for its size, in a few words; empty if it fits."""
    try:
        _try_pass(model, config, split, world, classes)
        return ""
    except Exception as error:
        if not _is_too_large(error):
            raise
        return str(error).strip().splitlines()[0][:120]
    finally:
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_too_large(error: Exception) -> bool:
    """Whether memory, or the largest grid a kernel can have, ran out: what launches raise."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    name, text = type(error).__name__, str(error)
    return name in _LAUNCH_ERRORS or any(sign in text for sign in _LAUNCH_SIGNS)


def _try_pass(
    model: nn.Module, config: TrainConfig, split: Split, world: World, classes: int
) -> None:
    """One forward and backward pass on a copy; what it holds is free again on return."""
    dtype, size, device = DTYPES[config.engine.precision], config.data.input_size, world.device
    state = torch.empty(_state_bytes(model, config, world.size), dtype=torch.uint8, device=device)
    twin = copy.deepcopy(model).to(device).train()
    for parameter in twin.parameters():  # buffers stay fp32, as in the engine
        parameter.data = parameter.data.to(dtype)
    images = torch.zeros(split.micro_batch, 3, size, size, dtype=dtype, device=device)
    logits = twin(images.contiguous(memory_format=torch.channels_last)).float()
    F.cross_entropy(logits, torch.full_like(logits, 1 / classes)).backward()
    del state


def _state_bytes(model: nn.Module, config: TrainConfig, world: int) -> int:
    """Bytes of the engine's fp32 state on one rank: masters, moments, average, gradients."""
    parameters = sum(p.numel() for p in model.parameters())
    kinds = 3 + bool(config.ema.decay)
    gradients = parameters if config.engine.zero_stage == 1 else parameters // world
    return 4 * (kinds * parameters // world + gradients)
