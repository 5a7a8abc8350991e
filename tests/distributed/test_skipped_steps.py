"""A step whose gradient is not finite, decided about on the device: as if it had never been."""

import itertools

import pytest
import torch
from forked_ranks import Ranks
from test_numerics import data, fused_adamw, network
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 6
POISON = {1: (0, "nan"), 4: (1, "inf")}
"""Step -> the rank and what becomes of a logit (a loss) or only of a gradient."""


class Poisoned(torch.autograd.Function):
    """The same values; a gradient with an infinity."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.tensor([float("inf")] + [0.0] * (gradient.shape[1] - 1))


class Waits(TorchDispatchMode):
    """Notes each value that the host reads from a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **(kwargs or {}))


def train(world, *, stage, clip, poisoned):
    """(state by name, applied steps, gradient norms, values read) of an engine's steps."""
    from l2vit.data.order import split
    from l2vit.train.config import EmaConfig, EngineConfig, OptimConfig
    from l2vit.train.engine import Engine

    torch.optim.AdamW = fused_adamw
    engine = Engine(
        network(norm=False),
        EngineConfig(zero_stage=stage, precision="bf16", channels_last=False),
        OptimConfig(clip_grad=clip),
        EmaConfig(decay=0.9, warmup=True),
        world=world,
        split=split(16, world=world.size, micro_batch=4),
    )
    norms, waits = [], Waits()
    for step in range(STEPS):
        rank, what = POISON.get(step, (None, None))
        if rank is not None and not poisoned:
            continue
        images, labels = data(step)
        with waits:
            for turn in range(2):
                first = (turn * world.size + world.rank) * 4
                logits = engine.forward(images[first : first + 4])
                if world.rank == rank and turn == 0:
                    logits = Poisoned.apply(logits) if what == "inf" else logits * float("nan")
                chosen = logits.log_softmax(1)[torch.arange(4), labels[first : first + 4]]
                engine.backward(-chosen.mean())
                if turn == 0:
                    engine.micro_step()
            outcome = engine.step(lr=1e-2, weight_decay=0.05)
        norms.append(float(outcome.grad_norm))
        assert outcome.applied == (rank is None)
    state = {key: view.clone() for key, _, view in engine.tensors()}
    steps = [int(held["step"]) for held in engine._states]
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.close()
    return state, weights, steps, norms, waits.count


def both(world):
    torch.set_num_threads(1)
    cases = itertools.product((1, 2), (0.0, 0.3))
    return {
        case: [train(world, stage=case[0], clip=case[1], poisoned=p) for p in (True, False)]
        for case in cases
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Ranks(both, 2, directory=tmp_path_factory.mktemp("ranks")).results()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_weights_moments_average_and_counters_are_left_alone(runs, stage, clip):
    for found in runs:
        (state, weights, steps, norms, _), plain = found[stage, clip]
        assert set(state) == set(plain[0]) and any(key.startswith("ema/") for key in state)
        assert all(torch.equal(state[key], plain[0][key]) for key in state)
        assert all(torch.equal(weights[name], plain[1][name]) for name in weights)
        assert steps == plain[2] == [STEPS - len(POISON)] * len(steps)
        assert [n for n in norms if n != float("inf")] == plain[3]
        assert [place for place, n in enumerate(norms) if n == float("inf")] == sorted(POISON)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_host_reads_nothing(runs, stage):
    """Neither we nor DeepSpeed, clipping or not."""
    assert [found[stage, clip][0][4] for found in runs for clip in (0.0, 0.3)] == [0] * 4
