"""A run that an earlier version saved continues with the losses that version went on to have.

``run_of_4652dcf.tar.gz`` holds shards, a checkpoint of step 6 and the records of all 12 steps,
made by commit 4652dcf on two ranks (fp32, ZeRO-2, RandAugment, mixup, cutmix, erasing, EMA).
"""

import json
import tarfile
from pathlib import Path

import pytest
from forked_ranks import Ranks
from small_runs import settings, train

from l2vit.train import checkpoint

SAVED = Path(__file__).with_name("run_of_4652dcf.tar.gz")


def by_step(path):
    """Everything recorded of each step, without what depends on the machine."""
    kept = ("loss", "norm", "rate", "percent", "skipped", "rollbacks", "epoch", "images")
    found = {}
    for record in map(json.loads, path.open()):
        values = {k: v for k, v in record.items() if k.endswith(kept) and "wait" not in k}
        found.setdefault(record["step"], {}).update(values)
    return found


def test_a_run_of_commit_4652dcf_continues_with_the_same_losses(tmp_path):
    with tarfile.open(SAVED) as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "run"
    path = settings(
        tmp_path / "shards",
        run,
        schedule__length="12 steps",
        schedule__warmup="2 steps",
        schedule__global_batch=8,
        engine__precision="fp32",
        engine__zero_stage=2,
        augment__auto_augment="rand-m9-mstd0.5-inc1",
        augment__label_smoothing=0.1,
        checkpoint__every="6 steps",
        checkpoint__keep_last=10,
        eval__every="6 steps",
        eval__batch=8,
    )
    ranks = Ranks(train, 2, path, directory=tmp_path, raw=True)
    assert ranks.wait() == [0, 0], ranks.log(0)[-3000:]
    assert "at step 6" in ranks.log(0)
    assert checkpoint.complete_steps(run) == [6, 12]
    expected, found = by_step(tmp_path / "expected.jsonl"), by_step(run / "metrics.jsonl")
    assert found.keys() == expected.keys() == set(range(1, 13))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4), step
    assert {"loss", "grad_norm", "val/loss", "val_ema/loss", "val/top1_percent"} <= set(found[12])
