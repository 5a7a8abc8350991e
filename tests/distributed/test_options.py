"""What the configuration switches: evaluation, initial weights, recomputation, precision."""

import json

import pytest
import torch
from forked_ranks import Ranks
from small_runs import losses, records, settings, train

from l2vit.train import checkpoint
from l2vit.train.checkpoint import Reader


def finish(path, size, directory):
    ranks = Ranks(train, size, path, directory=directory, raw=True)
    assert ranks.wait() == [0] * size, ranks.log(0)[-3000:]
    return ranks.log(0)


def evaluations(run):
    lines = map(json.loads, (run / "metrics.jsonl").open())
    return [line for line in lines if "val/top1_percent" in line]


def test_evaluation_is_exact_on_all_sets_and_disturbs_nothing(shards, tmp_path):
    quiet, busy = tmp_path / "quiet", tmp_path / "busy"
    short = {"schedule__length": "9 steps", "checkpoint__every": "100 steps"}
    finish(settings(shards, quiet, **short, eval__every="100 steps"), 2, tmp_path)
    extra = {"large": {"data": str(shards / "val"), "input_size": 24}}
    extra["again"] = {"data": str(shards / "val")}
    path = settings(shards, busy, **short, eval__every="2 steps", eval__extra=extra)
    finish(path, 2, tmp_path)
    assert losses(busy) == losses(quiet), "evaluation disturbed training"
    found = evaluations(busy)
    assert [line["step"] for line in found] == [2, 4, 6, 8, 9]
    for line in found:
        for name in ("val", "val_ema"):
            assert line[f"{name}/loss"] == line[f"{name.replace('val', 'again')}/loss"]
            assert line[f"{name}/loss"] != line[f"{name.replace('val', 'large')}/loss"]
        hits = line["val/top1_percent"] * 22 / 100
        assert hits == pytest.approx(round(hits), abs=1e-9), "22 images, each counted once"
    # One process counts the same images: the last checkpoint's weights, raw and averaged.
    reader = Reader(checkpoint.find(busy))
    assert f"raw {found[-1]['val/top1_percent']:.2f}, ema" in reader.choose().why
    for which, name in (("raw", "val"), ("ema", "val_ema")):
        loss = plain_evaluation(reader.weights(which), shards / "val")
        assert found[-1][f"{name}/loss"] == pytest.approx(loss, rel=2e-3)  # bf16 there, fp32 here


def plain_evaluation(weights, directory):
    """Mean cross-entropy over the whole set, in fp32, in this process."""
    from small_net import SmallNet

    from l2vit.data.config import AugmentConfig, DataConfig, EvalConfig, EvalSetConfig
    from l2vit.data.loader import eval_loader

    model = SmallNet(num_classes=4)
    model.load_state_dict(weights)
    model.eval()
    loader = eval_loader(
        EvalSetConfig(str(directory)),
        DataConfig(backend="host", input_size=16, threads=0),
        EvalConfig(batch=5, crop_fraction=1.0),
        AugmentConfig(),
        device=torch.device("cpu"),
    )
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in loader:
            rows = torch.log_softmax(model(batch.images).double(), 1)
            total -= rows[range(len(batch)), batch.labels].sum().item()
            count += len(batch)
    assert count == 22
    return total / count


def test_precedence_of_the_first_weights(shards, tmp_path):
    """Own run, then run.resume, then init.source."""
    first = tmp_path / "first"
    short = {"schedule__length": "8 steps", "model__name": "l2vit_mini", "data__input_size": 32}
    short |= {"model__window_size": 4, "model__args": {"depths": [1, 1, 1, 2]}}
    short |= {"eval__every": "100 steps", "schedule__global_batch": 4, "ema__decay": 0.0}
    finish(settings(shards, first, **short), 1, tmp_path)
    longer = {**short, "schedule__length": "10 steps", "schedule__warmup": "0 steps"}

    resumed = tmp_path / "resumed"
    fewer = {**longer, "data__subset": {"fraction": 0.6}}
    said = finish(settings(shards, resumed, **fewer, run__resume=str(first)), 1, tmp_path)
    assert "at step 8" in said and set(losses(resumed)) == {9, 10}
    assert "samples of data.subset are others than before" in said
    assert "is finished already" in finish(tmp_path / "resumed.yaml", 1, tmp_path)

    tuned = tmp_path / "tuned"
    path = settings(
        shards, tuned, **longer, init__source=str(first), optim__lr=1e-30, schedule__min_lr=0.0
    )
    finish(path, 1, tmp_path)
    assert set(losses(tuned)) == set(range(1, 11))
    start, end = (Reader(checkpoint.find(run)) for run in (first, tuned))
    for key in start.tensors:
        if key.startswith("param/"):
            torch.testing.assert_close(end.tensor(key), start.tensor(key))


def test_gradient_checkpointing_changes_nothing(shards, tmp_path):
    short = {
        "schedule__length": "3 steps",
        "schedule__warmup": "1 steps",
        "schedule__global_batch": 4,
        "model__name": "l2vit_mini",
        "model__window_size": 4,
        "model__args": {"depths": [1, 1, 1, 2]},
        "data__input_size": 32,
        "eval__every": "100 steps",
    }
    curves = []
    for recompute in (False, True):
        run = tmp_path / str(recompute)
        path = settings(shards, run, **short, engine__grad_checkpointing=recompute)
        finish(path, 1, tmp_path)
        curves.append([(r["loss"], r["grad_norm"]) for r in records(run)])
    assert curves[0] == curves[1]


def train_compiled(path):
    """With a back end that traces and differentiates but leaves out inductor's slow C++."""
    from functools import partialmethod

    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch._dynamo.utils import counters

    DeepSpeedEngine.compile = partialmethod(DeepSpeedEngine.compile, backend="aot_eager")
    status = train(path)
    assert counters["aot_autograd"]["ok"] > 0, "nothing was compiled"
    return status


def test_a_compiled_run_has_the_same_losses(shards, tmp_path):
    short = {"schedule__length": "4 steps", "schedule__warmup": "1 steps"}
    short |= {"eval__every": "2 steps", "engine__precision": "fp32"}
    curves = []
    for body, compiled in ((train, False), (train_compiled, True)):
        run = tmp_path / str(compiled)
        path = settings(shards, run, **short, engine__compile=compiled)
        ranks = Ranks(body, 1, path, directory=tmp_path, raw=True)
        assert ranks.wait() == [0], ranks.log(0)[-3000:]
        curves.append([value for r in records(run) for value in (r["loss"], r["grad_norm"])])
    assert len(curves[0]) == 8 and curves[1] == pytest.approx(curves[0], rel=1e-5)


def train_fp16(path, supported):
    """DeepSpeed asks the processor, which PyTorch does not need for fp16: answer in its place."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: supported
    return train(path)


def test_fp16_scales_its_loss_and_continues_with_its_scale(shards, tmp_path):
    run = tmp_path / "run"
    path = settings(shards, run, engine__precision="fp16", engine__zero_stage=2)
    refused = Ranks(train_fp16, 1, path, False, directory=tmp_path, raw=True)
    assert refused.wait() == [2] and "engine.precision" in refused.log(0)
    ranks = Ranks(train_fp16, 2, path, True, directory=tmp_path, raw=True)
    assert ranks.wait() == [0, 0], ranks.log(0)[-3000:]
    state = Reader(checkpoint.find(run)).meta.state
    assert state["loss_scaler"]["cur_scale"] >= 1
    assert state["applied_steps"] + state["skipped_steps"] == 24
    assert records(run)[-1]["loss"] < records(run)[0]["loss"]
    assert not (run / "nonfinite.jsonl").exists(), "looking for the scale is no fault"
