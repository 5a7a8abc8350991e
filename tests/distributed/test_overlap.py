"""ZeRO-1's sums over the ranks during the backward pass: when they begin, and the same bits."""

import pytest
import torch
import torch.distributed as dist
from forked_ranks import Ranks
from torch import nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """Six layers, one of them used twice, and one that has no part in the last step's output."""

    last_step = False

    def __init__(self, reentrant=False):
        super().__init__()
        self.reentrant = reentrant
        self.sometimes = nn.Linear(16, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        if not self.last_step:
            x = self.sometimes(x)
        for layer in [*self.layers, self.layers[2]]:
            again = self.reentrant and layer is self.layers[2]
            x = torch.tanh(checkpoint(layer, x, use_reentrant=True) if again else layer(x))
        return x


def engine_of(net, world, accumulation, **options):
    from l2vit.data.order import split
    from l2vit.train.config import EmaConfig, EngineConfig, OptimConfig
    from l2vit.train.engine import Engine

    engine = Engine(
        net,
        EngineConfig(channels_last=False, **options),
        OptimConfig(clip_grad=0.5),
        EmaConfig(),
        world=world,
        split=split(8 * accumulation, world=world.size, micro_batch=4),
    )
    engine.prepare = lambda x: x.to(engine.dtype)
    return engine


def train(world, *, accumulation, **options):
    """(state, the order of events in the last step's passes) of three steps."""
    torch.manual_seed(0)
    events = []
    engine = engine_of(Net(), world, accumulation, **options)
    for number in (0, 5):
        weight = engine.module.layers[number].weight
        weight.register_post_accumulate_grad_hook(lambda _, n=number: events.append(n))
    plain = dist.all_reduce

    def noted(tensor, *args, **options):
        events.append("sum")
        return plain(tensor, *args, **options)

    dist.all_reduce = noted
    for step in range(3):
        before = {key: view.clone() for key, _, view in engine.tensors()}
        engine.module.last_step = step == 2
        events.clear()
        for turn in range(accumulation):
            torch.manual_seed(100 * step + 10 * turn + world.rank)
            engine.backward(engine.forward(torch.randn(4, 16)).square().mean())
            if turn < accumulation - 1:
                engine.micro_step()
        during = list(events)
        engine.step(lr=1e-2, weight_decay=0.05)
    dist.all_reduce = plain
    state = {key: view.clone() for key, _, view in engine.tensors()}
    for key in state:
        if key.startswith("moment1/sometimes"):
            torch.testing.assert_close(state[key], 0.9 * before[key])  # of no gradient
    engine.close()
    return state, during


def gradients_in_parts(world):
    """What is said where a weight's gradient comes in two parts, as no bucket can know."""
    engine = engine_of(Net(reentrant=True), world, 1, overlap=True, bucket=200)
    try:
        with pytest.raises(RuntimeError) as error:
            engine.backward(engine.forward(torch.randn(4, 16)).square().mean())
    finally:
        engine.close()
    return str(error.value)


def both(world):
    found = {
        accumulation: [
            train(world, accumulation=accumulation, overlap=overlap, bucket=300)
            for overlap in (True, False)
        ]
        for accumulation in (1, 3)
    }
    return found | {"in parts": gradients_in_parts(world)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Ranks(both, 2, directory=tmp_path_factory.mktemp("ranks")).results()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_same_bits_and_sums_during_the_last_backward_pass_only(runs, accumulation):
    for found in runs:
        (state, events), (plain, plain_events) = found[accumulation]
        assert len(state) >= 3 * 14 / 2 - 3
        assert all(torch.equal(state[key], plain[key]) for key in plain)
        first_passes = [5, 0] * (accumulation - 1)
        assert events[: len(first_passes)] == first_passes, "a sum of half a gradient"
        last = events[len(first_passes) :]
        assert last.index("sum") < last.index(0)
        assert last.count("sum") >= 4
        assert plain_events == [*first_passes, 5, 0, "sum", "sum"]


def test_a_gradient_in_parts_is_refused(runs):
    for found in runs:
        assert "set engine.overlap=false" in found["in parts"]
