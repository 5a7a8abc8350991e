"""DeepSpeed behind one door: precision, ZeRO partitions, the optimizer step.

The precision policy is here and nowhere else: computation in bf16 (or fp16, fp32), master
weights, gradient accumulation, gradient communication and optimizer state in fp32, BatchNorm
statistics in fp32. The only file of the project that imports deepspeed.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from l2vit.data.order import Split
from l2vit.errors import ConfigError
from l2vit.train import precision, zero
from l2vit.train.config import EmaConfig, EngineConfig, OptimConfig
from l2vit.train.deferred import defer
from l2vit.train.distributed import World
from l2vit.train.ema import Ema
from l2vit.train.param_groups import optimizer_groups, param_groups, set_rates
from l2vit.train.precision import DTYPES
from l2vit.train.reduction import Reduction
from l2vit.train.zero import MOMENTS, Reader, ZeroShard
from l2vit.train.zero_foreach import Gradients, use_foreach

_NEVER = 1 << 62
_LARGEST_BUCKET = 500_000_000


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    grad_norm: torch.Tensor
    """Scalar on the device: global L2 norm of the gradient before clipping; inf if some rank's
    loss or gradient was not finite, and no rank changed its weights."""

    @property
    def applied(self) -> bool:
        """Whether the weights changed; waits for the device."""
        return math.isfinite(float(self.grad_norm))


def deepspeed_config(
    engine: EngineConfig, optim: OptimConfig, split: Split, *, parameters: int
) -> dict[str, Any]:
    """The DeepSpeed dictionary of a run of a model with so many trainable parameters.

    The fp32 accumulation and communication dtypes are what makes every stage follow the plain
    fp32-master loop; with DeepSpeed's defaults the stages differ from it, and from each other,
    by about 1e-3 after a few steps. DeepSpeed allocates its gradient bucket whole, by default
    500 M elements (1 to 2 GB), so it is given no more than the model can fill.
    """
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": min(parameters, engine.bucket or _LARGEST_BUCKET),
        "overlap_comm": engine.overlap and engine.zero_stage > 1,
    }
    if engine.zero_stage < 3:
        # A bucket is summed whole, once, in fp32, instead of weight by weight; DeepSpeed's other
        # way sums over all ranks just as well.
        zero["reduce_scatter"] = False
    if engine.zero_stage == 3:
        zero["memory_efficient_linear"] = False  # it computes the weight gradient differently
    settings: dict[str, Any] = {
        "train_batch_size": split.global_batch,
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": optim.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": _NEVER,
        # Else every micro-batch waits twice for the GPU; we time steps ourselves.
        "timers": {"throughput": {"enabled": False}},
    }
    if engine.precision != "fp32":
        settings[engine.precision] = {"enabled": True}
    return settings


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its state by parameter name."""

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optim: OptimConfig,
        ema: EmaConfig,
        *,
        world: World,
        split: Split,
    ) -> None:
        """Partition ``model`` (fp32, on any device) over the ranks.

        Args:
            model: holds the initial weights, the same on every rank; cast and moved in place.
            engine: precision, ZeRO stage, compilation.
            optim: AdamW's settings; rates are set at each step.
            ema: decay of the moving average.
            world: this rank's place; the process group is up.
            split: micro-batch and accumulation.
        """
        self.world, self.split = world, split
        self._applied_steps = 0
        self.dtype = DTYPES[engine.precision]
        self._channels_last = engine.channels_last
        if world.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = engine.tf32
            torch.backends.cudnn.allow_tf32 = engine.tf32
        masters = {name: p.detach().cpu().float().clone() for name, p in model.named_parameters()}
        self.groups = param_groups(
            model, layer_decay=optim.layer_decay, decay=optim.decay, train=optim.train
        )
        self._deepspeed = _initialize(model, engine, optim, split, self.groups, world)
        self._zero = self._deepspeed.optimizer
        held = use_foreach(self._zero)
        self._deferred = defer(self._zero) if held else None
        self._reduction: Reduction | None = None
        if isinstance(held, Gradients):
            self._reduction = Reduction(
                self._deepspeed, held, bucket=engine.bucket, overlap=engine.overlap
            )
        self._flats = zero.flat_masters(self._zero)
        self._states = list(zero.moments(self._zero.optimizer, self._flats))
        self.zero_shards = zero.own_shards(self.module, self._zero, world.rank)
        # DeepSpeed made its masters from weights already rounded to bf16.
        self._fill(self._flats, "param", _from_tensors(masters))
        self.ema: Ema | None = None
        if ema.decay:
            sources = [*self._flats, *self._float_buffers().values()]
            self.ema = Ema(sources, ema.decay, warmup=ema.warmup)
        if engine.compile is True:  # auto is settled by then, see ``kernels.settle``
            # One graph for each kind and size of batch: a kernel is chosen by its sizes.
            self._deepspeed.compile(compile_kwargs={"dynamic": False})

    @property
    def module(self) -> nn.Module:
        """The model as it computes: in the compute dtype, stage 3's gathering hooks included."""
        return self._deepspeed.module

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Images in the compute dtype, memory layout and place."""
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        return images.to(self.world.device, self.dtype, memory_format=layout)

    def forward(self, images: torch.Tensor, *others: Any) -> Any:
        """The network's output for a training micro-batch; a tensor comes back as fp32.

        Args:
            images: (B, 3, H, W); cast and moved.
            others: further arguments of the network, such as targets; passed on as they are.
        """
        return _in_fp32(self._deepspeed(self.prepare(images), *others))

    @torch.no_grad()
    def infer(self, images: torch.Tensor, *others: Any) -> Any:
        """Like ``forward`` in evaluation; the module must be in eval mode."""
        return _in_fp32(self.module(self.prepare(images), *others))

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss.

        A loss that is not finite poisons its gradient, which is finite now and then all the
        same, so that the step's own check, in which all ranks agree, sees it.
        """
        poison = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
        self._deepspeed.backward(loss * poison)

    def micro_step(self) -> None:
        """End a micro-batch that is not the step's last one."""
        self._deepspeed.step()

    def step(self, *, lr: float, weight_decay: float) -> StepOutcome:
        """End the last micro-batch: reduce, agree, and change the weights unless poisoned."""
        set_rates(self._zero.optimizer, lr=lr, weight_decay=weight_decay)
        self._deepspeed.step()
        applied = not self._zero.overflow
        self._applied_steps += applied
        if self.ema is not None and self._deferred is not None:
            self.ema.update_unless(self._deferred.skipped, self._states[0]["step"])
        elif self.ema is not None and applied:
            self.ema.update(self._applied_steps)
        norm = self._zero._global_grad_norm if applied else float("inf")
        return StepOutcome(_on_device(norm, self.world.device))

    # -- state by name

    @torch.no_grad()
    def load(self, read: Reader, *, moments: bool = True, ema: bool = True) -> None:
        """Take masters, moments and averages from ``read``; the model computes with them at once.

        Args:
            read: gives a run of ``param/NAME``, ``moment1/NAME``, ... as the shards ask.
            moments: also the optimizer's moments.
            ema: also the moving average; without, it restarts from the masters.
        """
        self._fill(self._flats, "param", read)
        if moments:
            for key, state in MOMENTS.items():
                self._fill([held[state] for held in self._states], key, read)
        for name, buffer in self._kept_buffers().items():
            buffer.copy_(read(f"buffer/{name}", 0, buffer.numel()).view(buffer.shape))
        if self.ema is not None:
            self.ema.reset()
            if ema:
                self._fill(self.ema.averages[: len(self._flats)], "ema", read)
                for name, average in self._ema_buffers().items():
                    average.copy_(read(f"ema/{name}", 0, average.numel()).view(average.shape))
        self._publish(self._flats)

    def tensors(self) -> Iterator[tuple[str, ZeroShard, torch.Tensor]]:
        """Views of this rank's state: (``param/NAME``, its shard, 1-D fp32 elements)."""
        kinds = {"param": self._flats}
        for key, state in MOMENTS.items():
            kinds[key] = [held[state] for held in self._states]
        if self.ema is not None:
            kinds["ema"] = self.ema.averages
        for kind, flats in kinds.items():
            for shard in self.zero_shards:
                yield f"{kind}/{shard.name}", shard, shard.of(flats)

    def buffers(self) -> dict[str, torch.Tensor]:
        """``buffer/NAME`` and ``ema/NAME`` of the buffers, on the device."""
        found = {f"buffer/{name}": buffer for name, buffer in self._kept_buffers().items()}
        if self.ema is not None:
            found |= {f"ema/{name}": average for name, average in self._ema_buffers().items()}
        return found

    @property
    def applied_steps(self) -> int:
        """Optimizer steps behind the moments (skipped ones do not count); may wait for the step."""
        return self._applied_steps if self._deferred is None else int(self._states[0]["step"])

    @applied_steps.setter
    def applied_steps(self, steps: int) -> None:
        self._applied_steps = steps
        for state in self._states:
            state["step"].fill_(steps)

    @property
    def loss_scaler(self) -> dict[str, float]:
        """fp16's dynamic loss scale and its counters; empty in other precisions."""
        scaler = self._zero.loss_scaler if self.dtype == torch.float16 else None
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}

    @loss_scaler.setter
    def loss_scaler(self, values: Mapping[str, float]) -> None:
        if self.dtype == torch.float16:
            for name, value in values.items():
                setattr(self._zero.loss_scaler, name, value)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Make BatchNorm statistics (and their average) the mean over ranks, on every rank."""
        if self.world.size == 1:
            return
        held = [*self._float_buffers().values(), *self._ema_buffers().values()]
        if not held:
            return
        flat = torch.cat([buffer.reshape(-1) for buffer in held])
        dist.all_reduce(flat)
        flat /= self.world.size
        for buffer, mean in zip(held, flat.split([b.numel() for b in held]), strict=True):
            buffer.copy_(mean.view(buffer.shape))

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the model computes with the moving average."""
        assert self.ema is not None, "the run keeps no moving average"
        held = {name: buffer.clone() for name, buffer in self._float_buffers().items()}
        self._publish(self.ema.averages)
        self._set_buffers(self._ema_buffers())
        try:
            yield
        finally:
            self._publish(self._flats)
            self._set_buffers(held)

    @torch.no_grad()
    def param_norm(self) -> float:
        """L2 norm of the fp32 master weights over all ranks."""
        norms = torch._foreach_norm([flat.detach() for flat in self._flats], 2, torch.float64)
        return self.world.sum([float(torch.stack(list(norms)).square().sum())])[0] ** 0.5

    def close(self) -> None:
        """Release DeepSpeed's hooks, and its own process group, lest a later run here takes it."""
        from deepspeed.utils import groups

        if self._reduction is not None:
            self._reduction.close()
        self._deepspeed.destroy()
        vars(groups)["_WORLD_GROUP"] = None

    # -- the partition

    @torch.no_grad()
    def _fill(self, flats: list[torch.Tensor], kind: str, read: Reader) -> None:
        for shard in self.zero_shards:
            source = read(f"{kind}/{shard.name}", shard.start, shard.numel)
            shard.of(flats).copy_(source)

    @torch.no_grad()
    def _publish(self, flats: list[torch.Tensor]) -> None:
        """Put the fp32 values of all ranks' partitions into the model, in its own dtype."""
        named = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        sizes = [_numel(parameter) for parameter in named.values()]
        whole = torch.zeros(sum(sizes), dtype=self.dtype, device=self.world.device)
        parts = dict(zip(named, whole.split(sizes), strict=True))
        for shard in self.zero_shards:
            run = parts[shard.name].narrow(0, shard.start, shard.numel)
            run.copy_(shard.of(flats))
        if self.world.size > 1:
            dist.all_reduce(whole)  # every element comes from one rank; the others add 0
        for name, parameter in named.items():
            _assign(parameter, parts[name], self.world.rank)

    def _kept_buffers(self) -> dict[str, torch.Tensor]:
        """Buffers that belong to the model's state: not index tables and masks made of sizes."""
        kept = self.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    def _float_buffers(self) -> dict[str, torch.Tensor]:
        return {n: b for n, b in self._kept_buffers().items() if b.is_floating_point()}

    def _ema_buffers(self) -> dict[str, torch.Tensor]:
        if self.ema is None:
            return {}
        averages = self.ema.averages[len(self._flats) :]
        return dict(zip(self._float_buffers(), averages, strict=True))

    def _set_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, buffer in self._float_buffers().items():
            buffer.copy_(values[name])


def _in_fp32(output: Any) -> Any:
    return output.float() if isinstance(output, torch.Tensor) else output


def _on_device(value: Any, device: torch.device) -> torch.Tensor:
    """A number or tensor as a scalar on ``device``; a number gets there without a copy."""
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(()).to(device)
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _numel(parameter: nn.Parameter) -> int:
    return torch.Size(zero.full_shape(parameter)).numel()


def _assign(parameter: Any, whole: torch.Tensor, rank: int) -> None:
    if not zero.is_stage3(parameter):
        parameter.data.copy_(whole.view(parameter.shape))
        return
    share = parameter.ds_tensor.numel()
    mine = whole.narrow(0, min(rank * share, whole.numel()), _own(rank, share, whole.numel()))
    parameter.ds_tensor.view(-1).narrow(0, 0, mine.numel()).copy_(mine)
    if parameter.numel() == whole.numel():  # small parameters stay whole on every rank
        parameter.data.copy_(whole.view(parameter.ds_shape))


def _own(rank: int, share: int, numel: int) -> int:
    return max(0, min(share, numel - rank * share))


def _from_tensors(tensors: Mapping[str, torch.Tensor]) -> Reader:
    def read(key: str, start: int, numel: int) -> torch.Tensor:
        return tensors[key.partition("/")[2]].reshape(-1).narrow(0, start, numel)

    return read


def _initialize(
    model: nn.Module,
    settings: EngineConfig,
    optim: OptimConfig,
    split: Split,
    groups: list[Any],
    world: World,
) -> Any:
    """Wrap ``model``; DeepSpeed's engine."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    accelerator = deepspeed.accelerator.get_accelerator()
    if settings.precision == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"engine.precision: DeepSpeed has no fp16 on {world.device.type}; use bf16 or fp32"
        )
    if world.device.type == "cpu":
        # Else it compiles, for a minute, a shared-memory operator that training does not use.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    buffers = precision.buffers_of(model, DTYPES[settings.precision])
    if settings.precision != "fp32":
        precision.widen_norms(model)
    model.to(world.device)
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    optimizer = make(
        optimizer_groups(groups, optim.weight_decay),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True if world.device.type == "cuda" else None,
    )
    gc.freeze()  # DeepSpeed collects garbage six times, a second in all if everything is looked at
    with contextlib.redirect_stdout(io.StringIO()):  # and reports its memory in twenty lines
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(
                settings, optim, split, parameters=sum(g.numel for g in groups)
            ),
            dist_init_required=False,
        )
    gc.unfreeze()
    for name, buffer in engine.module.named_buffers():
        buffer.data = buffers[name].to(world.device)  # DeepSpeed has cast them like parameters
    return engine
