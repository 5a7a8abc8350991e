"""Through DeepSpeed's own launcher: processes, variables and exit statuses as users get them."""

import os
import subprocess
import sys
from pathlib import Path

from forked_ranks import free_port
from small_runs import records, settings

from l2vit.train import checkpoint
from l2vit.train.checkpoint import Reader

ROOT = Path(__file__).resolve().parents[2]


def launch(path, *overrides):
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command += ["--master_port", str(free_port()), "launch/pretrain.sh"]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("RANK", None)
    return subprocess.run(
        [*command, "--config", str(path), *overrides],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def test_a_run_of_a_real_model_under_the_deepspeed_launcher(shards, tmp_path):
    run = tmp_path / "run"
    path = settings(
        shards,
        run,
        model__name="l2vit_mini",
        model__window_size=4,
        model__args={"depths": [1, 1, 1, 2]},
        data__input_size=32,
        schedule__length="3 steps",
        schedule__warmup="1 steps",
        schedule__global_batch=8,
        log__denominators_every=2,
        log__profile_steps=[2, 2],
        engine__zero_stage=2,
    )
    result = launch(path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert [record["step"] for record in records(run)] == [1, 2, 3]
    wanted = "grad_norm param_norm images_per_second data_wait_percent memory_gib seconds_left"
    assert set(wanted.split()) <= set(records(run)[-1])
    assert "clamped_percent/" in (run / "metrics.jsonl").read_text()
    assert list((run / "profile").glob("*.json*")), "no profiler trace"
    meta = Reader(checkpoint.find(run)).meta
    assert (meta.step, meta.images_seen, len(meta.classes)) == (3, 24, 4)
    assert meta.versions["deepspeed"] and meta.config["engine"]["zero_stage"] == 2
    refused = launch(path, "engine.zero_stag=1")
    assert refused.returncode == 2
    said = refused.stdout + refused.stderr
    assert said.count("did you mean engine.zero_stage?") == 1, "a shared error is told once"
