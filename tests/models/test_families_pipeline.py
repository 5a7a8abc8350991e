"""One small model of each family through the whole pipeline, from archive to timm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import l2vit  # noqa: F401

ROOT = Path(__file__).parents[2]


def run(*command):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def python(*arguments):
    return run(sys.executable, "-m", *arguments)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    python("data_prep", "digits", "--out", out / "raw")
    source = ("--dataset", "imagenet22k", "--source", out / "raw" / "digits_whole.tar")
    split = ("--split", "both", "--val-fraction", "0.2", "--shard-bytes", "512K")
    python("data_prep", "build", *source, "--out", out / "shards", *split, "--workers", "2")
    return out / "shards"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flatten_swin_mini", "inline_swin_mini"])
def test_quickstart_of_a_family(name, shards, tmp_path):
    """Train at 64 pixels, fine-tune at 96 with larger windows and resized tables, export."""
    data = (f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"model.name={name}")
    short = ("schedule.convention=swin", "eval.every=2 epochs", "checkpoint.every=2 epochs")
    run(
        *("bash", "launch/pretrain.sh", "--config", "pretrain/configs/quickstart_pretrain.yaml"),
        *(f"run.dir={tmp_path / 'pretrain'}", *data, *short),
        *("schedule.length=4 epochs", "schedule.warmup=1 epochs"),
    )
    run(
        *("bash", "launch/finetune.sh", "--config", "finetune/configs/quickstart_finetune.yaml"),
        *(f"run.dir={tmp_path / 'finetune'}", f"init.source={tmp_path / 'pretrain'}"),
        *(*data, *short, "schedule.length=2 epochs", "init.head=keep"),
    )
    report = (tmp_path / "finetune" / "transfer_report.txt").read_text()
    tables = [line for line in report.splitlines() if line.startswith("resized")]
    # Focused encodings and softmax bias tables; InLine has no encodings.
    assert len(tables) == {"flatten_swin_mini": 4 + 4, "inline_swin_mini": 2}[name]
    out = tmp_path / "timm"
    python("finetune.export_timm", "--checkpoint", tmp_path / "finetune", "--out", out)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 10)
    scores = tmp_path / "scores.json"
    python("finetune.evaluate", "--model", out, "--data", shards / "val", "--json", scores)
    assert json.loads(scores.read_text())["top1"] > 60  # ten classes: chance is 10
