"""Networks of timm that are not ours, BatchNorm's among them: the whole way, in bf16 and fp32."""

import json

import pytest
import timm
import torch
from forked_ranks import Ranks
from small_net import TIMM_MODELS
from small_runs import losses, settings, train

from finetune import evaluate, export_timm
from l2vit.train import checkpoint
from l2vit.train.checkpoint import Reader


def finish(path, directory, size=1):
    ranks = Ranks(train, size, path, directory=directory, raw=True)
    assert ranks.wait() == [0] * size, ranks.log(0)[-3000:]
    return ranks.log(0)


def count(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=4, **sized(name), **TIMM_MODELS[name])
    return sum(p.numel() for p in model.parameters())


def sized(name):
    return {"img_size": 64} if name.startswith(("swin", "vit")) else {}


# A convolutional one with BatchNorm and a transformer in every run of the tests, all in CI.
OFTEN = ("resnet18", "vit_tiny_patch16_224")
MODELS = [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.ci) for name in TIMM_MODELS]


@pytest.mark.parametrize("name", MODELS)
def test_trains_resumes_evaluates_exports_and_fine_tunes(name, shards, tmp_path, same_process):
    short = {
        "model__name": name,
        "model__args": TIMM_MODELS[name],
        "model__drop_path_rate": 0.0,
        "data__input_size": 64,
        "schedule__global_batch": 8,
        "schedule__length": "2 steps",
        "schedule__warmup": "0 steps",
        "optim__lr": 1e-4,
        "ema__decay": 0.0,
        "engine__zero_stage": 3 if name == "resnet18" else 1,
        "checkpoint__every": "100 steps",
        "checkpoint__keep_last": 1,
    }
    run = tmp_path / "run"
    said = finish(settings(shards, run, **short), tmp_path)
    assert f"{count(name) / 1e6:.3f} M parameters" in said, "ZeRO-3 counts its own share"
    finish(settings(shards, run, **{**short, "schedule__length": "3 steps"}), tmp_path)
    assert sorted(losses(run)) == [1, 2, 3] and Reader(checkpoint.find(run)).meta.step == 3

    exported = tmp_path / "exported"
    arguments = ["--checkpoint", str(run), "--out", str(exported), "--proof-images", "4"]
    assert export_timm.main(arguments) == 0
    figures = []
    for model in (run, exported):
        path = tmp_path / "figures.json"
        arguments = ["--model", str(model), "--data", str(shards / "val"), "--threads", "0"]
        assert evaluate.main([*arguments, "--json", str(path)]) == 0
        figures.append(json.loads(path.read_text()))
    assert figures[0]["top1_right"] == figures[1]["top1_right"]
    assert isinstance(timm.create_model(f"local-dir:{exported}", pretrained=True), torch.nn.Module)

    tuned = tmp_path / "tuned"
    still = {**short, "init__source": str(exported), "optim__lr": 1e-30, "schedule__min_lr": 0.0}
    finish(settings(shards, tuned, **still, engine__precision="fp32"), tmp_path)
    before, after = (Reader(checkpoint.find(r)).weights("raw") for r in (run, tuned))
    for key in before:
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(after[key], before[key])
