"""Run by two ranks: how many bytes DeepSpeed really holds for each weight, by ZeRO stage."""

import gc
import json
import sys

import timm
import torch

import l2vit  # noqa: F401
from l2vit import config
from l2vit.train import distributed
from l2vit.train.batching import split
from l2vit.train.config import TrainConfig
from l2vit.train.engine import Engine


def held() -> dict[int, int]:
    """Address and size of every storage that some Python object knows."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def measure(world: distributed.World, stage: int) -> dict[str, float]:
    before = held()
    tree = {
        "run": {"dir": "unused"},
        "model": {"name": "l2vit_mini"},
        "schedule": {"global_batch": 8},
        "engine": {"zero_stage": stage},
        "ema": {"decay": 0.9},
    }
    model = timm.create_model("l2vit_mini", num_classes=10)
    settings = config.from_tree(TrainConfig, tree)
    shared = split(8, world=world.size, micro_batch=2)
    engine = Engine(model, settings, world=world, split=shared)
    engine.backward(engine.forward(torch.randn(2, 3, 32, 32)).logsumexp(1).mean())
    new = [size for address, size in held().items() if address not in before]
    parameters = sum(p.numel() for p in timm.create_model("l2vit_mini").parameters())
    engine.close()
    # The bucket is one allocation far larger than this model; its size is DeepSpeed's setting.
    bucket = [size for size in new if size > 100 * parameters]
    held_bytes = sum(size for size in new if size not in bucket)
    return {"held": held_bytes, "bucket": sum(bucket)}


world = distributed.start(distributed.from_environment())
found = {stage: measure(world, stage) for stage in (1, 2, 3)}
if world.main:
    print("HELD " + json.dumps(found))
distributed.stop()
sys.exit(0)
