"""From a pre-training run to a larger size, to timm, to the same accuracy: the real programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from digit_models import WNIDS
from safetensors.torch import load_file

from finetune import evaluate, export_timm, train
from l2vit.config import load
from l2vit.train import checkpoint
from l2vit.train.classification import mix_off_steps
from l2vit.train.config import TrainConfig
from l2vit.train.param_groups import param_groups
from l2vit.train.schedule import Schedule
from l2vit.train.weights import read_pretrained

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from forked_ranks import free_port

ROOT = Path(__file__).parents[2]
RECIPE = {
    "run": {"dir": "set on the command line"},
    "model": {"name": "l2vit_mini", "window_size": 4},
    "data": {"backend": "host", "threads": 0, "input_size": 32, "chunk": 8},
    "augment": {"auto_augment": "", "hflip": 0.0, "mixup": 0.2},
    "schedule": {"global_batch": 16, "length": "4 steps", "warmup": "1 steps"},
    "optim": {"lr": 1e-3},
    "engine": {"precision": "fp32"},
    "eval": {"every": "4 steps", "crop_fraction": 1.0},
    "checkpoint": {"every": "4 steps"},
    "ema": {"decay": 0.5},
}


def launch(config, *overrides, ranks=1, program="finetune.train"):
    """``program`` on ``ranks`` processes, as launch/finetune.sh starts them."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if ranks > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", *program.split(), "--config", str(config), *overrides],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    return outputs


@pytest.mark.ci
def test_a_run_at_two_sizes_ends_as_the_same_timm_model(tmp_path, shards, same_process):
    """Pre-training under ZeRO-3 on two ranks, then fine-tuning under ZeRO-2 at 48 with window 6."""
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(RECIPE))
    data = [f"data.train={shards}", f"data.val={shards}"]
    first, second = tmp_path / "first", tmp_path / "second"
    zero3 = ["engine.zero_stage=3", f"run.dir={first}"]
    launch(config, *data, *zero3, ranks=2, program="pretrain train")
    larger = ["data.input_size=48", "model.window_size=6", "engine.zero_stage=2"]
    options = ["optim.layer_decay=0.7", "augment.mix_off_epochs=0.2", "eval.crop_mode=squash"]
    (text,) = launch(config, *data, *larger, *options, f"run.dir={second}", f"init.source={first}")
    assert "75% of the positions" in text and "head kept" in text

    report = json.loads((second / "transfer_report.json").read_text())
    assert report["source"].startswith(str(first)) and report["weights"] == "ema"
    assert {tensor["fate"] for tensor in report["tensors"]} == {"loaded"}
    assert (second / "transfer_report.txt").exists()

    recorded = checkpoint.read_meta(checkpoint.find(second)).metrics
    for weights in ("raw", "ema"):
        out = tmp_path / f"timm_{weights}"
        arguments = ["--checkpoint", str(second), "--out", str(out), "--weights", weights]
        assert export_timm.main([*arguments, "--proof-images", "8"]) == 0
        right = []
        for model in (out, second):
            figures = tmp_path / "figures.json"
            flags = ["--json", str(figures), "--threads", "0", "--weights", weights]
            assert evaluate.main(["--model", str(model), "--data", str(shards), *flags]) == 0
            found = json.loads(figures.read_text())
            assert (found["input_size"], found["window_size"]) == (48, 6)
            right.append(found["top1_right"])
        name = "val" if weights == "raw" else "val_ema"
        assert right[0] == right[1] == round(recorded[f"{name}/top1_percent"] * 1.2)
    raw, ema = (load_file(tmp_path / f"timm_{w}" / "model.safetensors") for w in ("raw", "ema"))
    assert not torch.equal(raw["head.fc.weight"], ema["head.fc.weight"])
    config = json.loads((out / "config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == list(WNIDS)


@pytest.mark.parametrize("name", ["flatten_swin_mini", "inline_swin_mini"])
def test_a_model_of_each_family_goes_the_same_way(name, tmp_path, shards, same_process):
    """Pre-trained, exported and loaded by timm; test_families_pipeline.py does it at length."""
    config, run, out = tmp_path / "recipe.yaml", tmp_path / "run", tmp_path / "timm"
    config.write_text(yaml.safe_dump(RECIPE))
    data = [f"data.train={shards}", f"data.val={shards}", f"run.dir={run}", f"model.name={name}"]
    data += ["model.window_size=2", "schedule.length=2 steps", "eval.every=2 steps"]
    launch(config, *data, "checkpoint.every=2 steps", program="pretrain train")
    arguments = ["--checkpoint", str(run), "--out", str(out), "--weights", "raw"]
    assert export_timm.main([*arguments, "--proof-images", "8"]) == 0
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    trained = read_pretrained(run, weights="raw").build().eval()
    start = timm.create_model(name, num_classes=10, img_size=32, window_size=2)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(images), trained(images))
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert {n: p.shape for n, p in model.state_dict().items()} == {
        n: p.shape for n, p in start.state_dict().items()
    }


def test_layer_decay_follows_the_depth():
    """l2vit_mini has 8 blocks, a stem below and norm and head above: 0.7 to the distance."""
    model = timm.create_model("l2vit_mini")
    scale = {name: g.lr_scale for g in param_groups(model, layer_decay=0.7) for name in g.names}
    assert scale["head.fc.weight"] == 1.0
    blocks = [
        scale[f"stages.{stage}.blocks.{block}.mlp.fc1.weight"]
        for stage in range(4)
        for block in range(2)
    ]
    for lower, upper in zip([scale["stem.layers.0.weight"], *blocks], blocks, strict=False):
        assert lower < upper
        assert (torch.tensor(lower / upper).log() / torch.tensor(0.7).log()).item() == (
            pytest.approx(round(torch.tensor(lower / upper).log().item() / -0.35667494), abs=1e-5)
        )
    assert {g.lr_scale for g in param_groups(model)} == {1.0}


@pytest.mark.parametrize(("off", "expected"), [(0, 30 * 1251), (10, 20 * 1251), (0.5, 36905)])
def test_mixup_may_end_early(off, expected):
    path = ROOT / "finetune/configs/in22k_in1k_base_224.yaml"
    config = load(TrainConfig, path, [f"augment.mix_off_epochs={off}"])
    steps = 1_281_167 // 1024
    schedule = Schedule.build(config.schedule, config.optim, steps_per_epoch=steps)
    assert schedule.total - mix_off_steps(config.augment, steps_per_epoch=steps) == expected


@pytest.mark.parametrize(
    ("overrides", "status", "words"),
    [
        (["optim.rate=1"], 2, "optim.rate"),
        (["init.head=half"], 2, "init.head"),
        (["run.dir=RUN", "data.train=/nowhere"], 1, "/nowhere"),
    ],
)
def test_one_line_that_names_what_to_mend(tmp_path, overrides, status, words, capfd, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    path = str(ROOT / "finetune/configs/in22k_in1k_base_384.yaml")
    overrides = [o.replace("RUN", str(tmp_path / "run")) for o in overrides]
    assert train.main(["--config", path, *overrides]) == status
    error = capfd.readouterr().err.strip()
    assert words in error and error.count("\n") == 0
