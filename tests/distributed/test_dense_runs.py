"""Detection and segmentation on real ranks: killed and continued, and split over two."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import yaml
from forked_ranks import Ranks
from small_runs import losses

from l2vit import cli
from l2vit.train import checkpoint, tasks
from l2vit.train.checkpoint import Reader

COMMON = {
    "init": {"source": "scratch"},
    "optim": {"lr": 1e-3, "decay": "all"},
    "engine": {"precision": "fp32", "channels_last": False},
    "checkpoint": {"every": "2 steps", "keep_last": 10},
    "log": {"every": 1},
}
DETECT = {
    "task": "detect",
    "model": {"name": "l2vit_mini", "head": "retinanet", "fpn_channels": 16},
    "augment": {
        "short_sides": [48, 64],
        "long_side": 80,
        "crop_short_sides": [72],
        "crop_sides": [40, 60],
    },
    "schedule": {"global_batch": 4, "length": "8 steps", "warmup": "2 steps"},
    "eval": {"every": "", "short_side": 64, "long_side": 80},
}
SEGMENT = {
    "task": "segment",
    "model": {
        "name": "l2vit_mini",
        "head_channels": 16,
        "auxiliary_channels": 8,
        "head_norm": "batch",
        "drop_path_rate": 0.2,
    },
    "augment": {"short_side": 64, "long_side": 80, "crop": 64},
    "schedule": {"global_batch": 4, "length": "8 steps", "warmup": "2 steps"},
    "eval": {"every": "", "short_side": 64, "long_side": 80},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Twelve made scenes to train on, an epoch of three steps, and three to evaluate on."""
    from finetune import sample_scenes

    root = tmp_path_factory.mktemp("scenes")
    assert sample_scenes.main(["--out", str(root), "--images", "12"]) == 0
    return root


def settings(scenes, run, task, **changes):
    """Write the YAML of a small run; ``changes`` replace whole sections' keys."""
    tree = json.loads(json.dumps({**COMMON, **(DETECT if task == "detect" else SEGMENT)}))
    tree["run"] = {"dir": str(run)}
    layout = "coco" if task == "detect" else "ade"
    tree["data"] = {"root": str(scenes / layout), "threads": 1}
    if task == "segment":
        tree["data"]["classes"] = 10
    for section, values in changes.items():
        tree[section] |= values
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def train(path):
    """What a rank does: finetune's main on ``path``; its exit status."""
    from finetune.train import main

    return cli.run(lambda: main(["--config", str(path)]), program="finetune train", report=True)


def train_until_killed(path, forwards):
    """Train, and be killed by SIGKILL in forward pass number ``forwards``."""
    from l2vit.train.engine import Engine

    forward, count = Engine.forward, 0

    def counted(self, *inputs):
        nonlocal count
        count += 1
        if count == forwards:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *inputs)

    Engine.forward = counted
    return train(path)


def finish(path, size, directory):
    ranks = Ranks(train, size, path, directory=directory, raw=True)
    assert ranks.wait() == [0] * size, ranks.log(0)[-3000:]


def tensors(run):
    reader = Reader(checkpoint.find(run))
    reader.verify()
    return {key: reader.tensor(key) for key in reader.tensors}


@pytest.mark.ci
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_killed_within_an_epoch_the_run_continues_bit_for_bit(task, scenes, tmp_path):
    """Augmentation and stochastic depth are on; a step's batch is two backward passes."""
    micro = {"engine": {**COMMON["engine"], "micro_batch": 2}}
    finish(settings(scenes, tmp_path / "whole", task, **micro), 1, tmp_path)
    run = tmp_path / "killed"
    path = settings(scenes, run, task, **micro)
    ranks = Ranks(train_until_killed, 1, path, 10, directory=tmp_path, raw=True)
    assert ranks.wait() == [-signal.SIGKILL] and not (run / "DONE").exists()
    assert checkpoint.complete_steps(run)[-1] in (2, 4), "step 5 was under way, in epoch 2"
    finish(path, 1, tmp_path)
    expected, found = tensors(tmp_path / "whole"), tensors(run)
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == 8


# -- two ranks


def pictures_seen(world, path, steps):
    """(sample ids, pictures, targets) of every micro-batch of this rank's first steps."""
    from l2vit.data.order import split

    config = tasks.load_config(path)
    task = tasks.kind(config.task).make(config)
    shares = split(4, world=world.size, micro_batch=2, multiple_of=task.batch_multiple)
    loader = task.loader(shares, world, images_seen=0, directory=path.parent)
    seen = [next(loader) for _ in range(steps * shares.accumulation)]
    loader.close()
    return [(batch.sample_ids, batch.pictures, batch.targets) for batch in seen]


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_two_ranks_have_one_ranks_order_and_draws(task, scenes, tmp_path):
    path = settings(scenes, tmp_path / "run", task)
    [whole] = Ranks(pictures_seen, 1, path, 4, directory=tmp_path).results()
    parts = Ranks(pictures_seen, 2, path, 4, directory=tmp_path).results()
    merged = [parts[rank][step] for step in range(4) for rank in (0, 1)]
    assert len(whole) == len(merged) == 8
    for (ids, pictures, targets), (other_ids, others, other_targets) in zip(
        whole, merged, strict=True
    ):
        assert ids.tolist() == other_ids.tolist()
        assert all(map(same, pictures, others)) and all(map(same, targets, other_targets))


def figures(world, path):
    """What an evaluation in training says of a network with seeded weights; its beats."""
    config = tasks.load_config(path)
    task = tasks.kind(config.task).make(config)
    network = task.network()
    for name, tensor in network.named_parameters():
        if name.endswith("cls_logits.bias"):
            torch.nn.init.zeros_(tensor)  # else nothing scores enough to be a detection
        if name == "head.1.weight":
            torch.nn.init.normal_(tensor)  # else all pixels are of one class
    beats = []
    evaluator = task.evaluator(world, lambda: beats.append(1))
    engine = SimpleNamespace(module=network, ema=None, average_buffers=lambda: None)
    found = evaluator.run(engine)
    return found, len(beats), evaluator.picture() is not None


def findable(scenes, path):
    """The validation set with large objects of every class, some of which any network finds."""
    data = json.loads((scenes / "coco/annotations/instances_val2017.json").read_text())
    data["annotations"] = []
    for image in data["images"]:
        width, height = image["width"], image["height"]
        for box in ([0, 0, width, height], [width // 4, height // 4, width // 2, height // 2]):
            for category in range(1, 11):
                entry = {"image_id": image["id"], "category_id": category, "iscrowd": 0}
                number = len(data["annotations"]) + 1
                area = box[2] * box[3]
                data["annotations"].append({**entry, "id": number, "bbox": box, "area": area})
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_two_ranks_score_as_one(task, scenes, tmp_path):
    data = {"val_json": str(findable(scenes, tmp_path / "val.json"))} if task == "detect" else {}
    path = settings(scenes, tmp_path / "run", task, data=data)
    [(whole, beats, shown)] = Ranks(figures, 1, path, directory=tmp_path).results()
    parts = Ranks(figures, 2, path, directory=tmp_path).results()
    assert [part[0] for part in parts] == [whole, whole]
    assert len(whole) == (12 if task == "detect" else 3) and max(whole.values()) > 0
    assert beats == 3 and [part[1] for part in parts] == [2, 2]  # of three pictures
    assert shown and [part[2] for part in parts] == [True, False]
