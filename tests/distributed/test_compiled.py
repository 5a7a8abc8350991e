"""The compiled network in the engine: one graph, and one for each kind of pass."""

import pytest
import torch
from forked_ranks import Ranks

from l2vit.data.order import split
from l2vit.train.config import EmaConfig, EngineConfig, OptimConfig

SIZE, HEADS = 32, 2


def passes(world, stage):
    """(graph breaks, graphs) after training, evaluation, training, watching denominators."""
    from functools import partialmethod

    import timm
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch._dynamo.utils import counters

    import l2vit  # noqa: F401
    from l2vit.train.denominators import Denominators
    from l2vit.train.engine import Engine

    DeepSpeedEngine.compile = partialmethod(DeepSpeedEngine.compile, backend="eager")
    torch.manual_seed(0)
    network = timm.create_model(
        "l2vit_mini", num_classes=8, depths=[1, 2], window_size=4, drop_path_rate=0.1
    )
    engine = Engine(
        network,
        EngineConfig(zero_stage=stage, compile=True),
        OptimConfig(),
        EmaConfig(decay=0.5),
        world=world,
        split=split(4, world=1, micro_batch=4),
    )
    watched = Denominators(engine.module, world=world)
    images = torch.randn(4, 3, SIZE, SIZE)

    def train():
        engine.module.train()
        engine.backward(engine.forward(images).square().mean())
        engine.step(lr=1e-3, weight_decay=0.05)

    def evaluate():
        engine.module.eval()
        with engine.averaged_weights():
            engine.infer(images)

    graphs = []
    for action in (train, evaluate, train, evaluate):
        action()
        graphs.append(counters["stats"]["unique_graphs"])
    for _ in range(2):
        with watched.watch():
            train()
        train()
        graphs.append(counters["stats"]["unique_graphs"])
    counted = [counter.counts[:-1].sum().item() for counter in watched._counters.values()]
    engine.close()
    return dict(counters["graph_break"]), graphs, counted


@pytest.mark.ci
@pytest.mark.parametrize("stage", [1, 2])
def test_one_graph_for_each_kind_of_pass(stage, tmp_path):
    (found,) = Ranks(passes, 1, stage, directory=tmp_path).results()
    breaks, graphs, counted = found
    assert breaks == {}
    assert graphs == [1, 2, 2, 2, 3, 3]
    assert counted == [2 * 4 * HEADS * (SIZE // 8) ** 2]  # passes, images, heads, tokens
