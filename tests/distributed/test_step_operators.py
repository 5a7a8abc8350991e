"""How many operators a step takes: as many for a network of many weights as for one of few."""

import torch
from forked_ranks import Ranks
from torch.utils._python_dispatch import TorchDispatchMode

from l2vit.data.order import split
from l2vit.train.config import EmaConfig, EngineConfig, OptimConfig


class Counted(TorchDispatchMode):
    """Counts operators."""

    calls = additions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        self.additions += function is torch.ops.aten.add_.Tensor
        return function(*args, **(kwargs or {}))


def operators(world):
    """Of the second optimizer step by ZeRO stage, for networks of 8 and of 40 weights; additions
    in the backward pass of a further micro-batch at ZeRO-1."""
    steps = {stage: [of_a_step(world, stage, depth) for depth in (4, 20)] for stage in (1, 2)}
    engine = engine_of(world, 1, 4, micro_batch=2)
    engine.backward(engine.forward(torch.randn(2, 16)).square().mean())
    engine.micro_step()
    with Counted() as counted:
        engine.backward(engine.forward(torch.randn(2, 16)).square().mean())
    engine.close()
    return steps, counted.additions


def engine_of(world, stage, depth, *, micro_batch=4):
    from torch import nn

    from l2vit.train.engine import Engine

    torch.manual_seed(0)
    engine = Engine(
        nn.Sequential(*[nn.Linear(16, 16) for _ in range(depth)]),
        EngineConfig(zero_stage=stage, channels_last=False),
        OptimConfig(clip_grad=1.0),
        EmaConfig(decay=0.5),
        world=world,
        split=split(4, world=1, micro_batch=micro_batch),
    )
    engine.prepare = lambda x: x.to(engine.dtype)
    return engine


def of_a_step(world, stage, depth):
    engine = engine_of(world, stage, depth)
    for _ in range(2):
        engine.backward(engine.forward(torch.randn(4, 16)).square().mean())
        with Counted() as counted:
            engine.step(lr=1e-3, weight_decay=0.05)
    engine.close()
    return counted.calls


def test_a_step_of_many_weights_takes_no_more_operators(tmp_path):
    """DeepSpeed's own ZeRO-2 takes eighteen for each weight."""
    ((found, additions),) = Ranks(operators, 1, directory=tmp_path).results()
    assert additions == 0  # gradients are summed in fp32 only, all at once
    for few, many in found.values():
        assert many == few < 120
