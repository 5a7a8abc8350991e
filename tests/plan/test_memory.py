"""Memory of a rank by ZeRO stage against what DeepSpeed really holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import l2vit  # noqa: F401
from l2vit.plan.memory import checkpoint_bytes, per_rank


@pytest.fixture(scope="module")
def held():
    """Bytes two ranks hold after a backward pass, by stage."""
    script = Path(__file__).with_name("held_by_deepspeed.py")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*ranks, str(script)], env=environment, capture_output=True, text=True)
    line = next((x for x in done.stdout.splitlines() if x.startswith("HELD ")), None)
    assert line is not None, done.stdout + done.stderr
    return json.loads(line.removeprefix("HELD "))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_hold_what_the_formula_says(held, stage):
    model = timm.create_model("l2vit_mini", num_classes=10)
    parameters = sum(p.numel() for p in model.parameters())
    found = per_rank(parameters, stage=stage, ranks=2, precision="bf16", ema=True, bucket=0)
    # Stage 3 gathers weights as it needs them: the formula reserves for all of them at once.
    gathered = 2 * parameters if stage == 3 else 0
    measured = held[str(stage)]["held"]
    assert found.total - gathered <= 1.02 * measured
    assert measured <= 1.02 * found.total


def test_by_hand_for_a_hundred_million_weights_on_eight_ranks():
    million = 1_000_000
    first = per_rank(100 * million, stage=1, ranks=8, precision="bf16")
    assert (first.weights, first.gradients, first.optimizer) == (
        200 * million,
        600 * million,
        150 * million,
    )
    second = per_rank(100 * million, stage=2, ranks=8, precision="bf16", ema=True, bucket=million)
    assert (second.gradients, second.optimizer) == (52 * million, 200 * million)
    third = per_rank(100 * million, stage=3, ranks=8, precision="bf16", bucket=0, activations=7.0)
    assert (third.weights, third.gradients, third.activations) == (225 * million, 50 * million, 7.0)
    assert third.total == (225 + 50 + 150) * million + 7
    exact = per_rank(100 * million, stage=1, ranks=8, precision="fp32")
    assert (exact.weights, exact.gradients) == (400 * million, 400 * million)


def test_a_checkpoint_holds_fp32_weights_and_moments():
    assert checkpoint_bytes(10) == 120
    assert checkpoint_bytes(10, buffers=3, ema=True) == 160 + 24
