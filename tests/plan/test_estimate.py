"""The plan's arithmetic against figures worked out by hand, and its command line."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from l2vit import config
from l2vit.errors import ConfigError
from l2vit.plan import compare, devices, report
from l2vit.plan.devices import DEVICES
from l2vit.plan.estimate import Cluster, Work, communication, estimate
from l2vit.train.config import TrainConfig
from pretrain import plan

ROOT = Path(__file__).parents[2]
IN22K = ROOT / "pretrain" / "configs" / "in22k_base.yaml"
EIGHT = Cluster(DEVICES["h100"], 8, 8)


def settings(*overrides: str) -> TrainConfig:
    small = ["model.name=l2vit_mini", "data.input_size=64", "model.drop_path_rate=0"]
    return config.load(TrainConfig, IN22K, [*small, *overrides])


@pytest.fixture(scope="module")
def small():
    return estimate(settings(), EIGHT, Work(images=14_200_000, classes=1000, val_images=50_000))


def test_steps_of_the_paper(small):
    """14.2 M images and 90 epochs at batch 4096: floor(14.2e6 / 4096) = 3466 steps an epoch."""
    assert (small.steps_per_epoch, small.schedule.total) == (3466, 3466 * 90)
    assert small.schedule.warmup == 3466 * 5
    assert small.split.global_batch == 4096
    assert small.split.micro_batch * small.split.accumulation * 8 == 4096


def test_totals_follow_from_a_step(small):
    busy = small.compute + small.communication
    assert small.data == pytest.approx(4096 / (8 * 3000.0))
    assert small.step == max(busy, small.data)
    assert small.seconds == pytest.approx(small.step * 311_940 + small.evaluation)
    assert small.gpu_hours == pytest.approx(small.seconds * 8 / 3600)
    shown = report.values(small, price=2.0)
    assert shown["cost"] == pytest.approx(2 * small.gpu_hours)
    # Weights and both moments in fp32; two last, one best, one being written, nine for good.
    assert shown["checkpoint_gib"] == pytest.approx(12 * small.trace.parameters / 2**30)
    assert shown["checkpoints_kept"] == 13


def test_arithmetic_of_the_papers_run():
    """About 1.2e20 floating-point operations (recipes: 14.2 M images, 90 epochs, L2ViT-B)."""
    whole = config.load(TrainConfig, IN22K, ["engine.micro_batch=64"])
    found = estimate(whole, EIGHT, Work(14_197_122, 21_841))
    assert found.flops == pytest.approx(1.2e20, rel=0.02)


def test_communication_by_hand():
    """Two nodes of eight: 7/8... of the weights go round the ring; fp32 gradients, bf16 weights."""
    cluster = Cluster(DEVICES["h100"], 16, 8)
    bandwidth = min(450, 8 * 50) * 0.7e9
    around = 15 / 16 * 1e8
    latency = 20e-6 * math.ceil(math.log2(16))
    cases = {
        1: (8 * around + 2 * around) / bandwidth + 3 * latency,
        2: (4 * 4 * around + 2 * around) / bandwidth + 5 * latency,
        3: 4 * (4 * around + 4 * around) / bandwidth + 12 * latency,
    }
    for stage, seconds in cases.items():
        found = communication(settings(f"engine.zero_stage={stage}"), cluster, 10**8, 4)
        assert found == pytest.approx(seconds), stage
    alone = Cluster(DEVICES["h100"], 1, 8)
    assert communication(settings(), alone, 10**8, 1) == 0
    assert cluster.nodes == 2 and EIGHT.bus_gbs == pytest.approx(450 * 0.7)


def test_what_binds(small):
    assert small.binding in ("compute", "communication", "data")
    slow_loader = replace(DEVICES["h100"], images_per_second=1.0)
    found = estimate(settings("engine.micro_batch=64"), Cluster(slow_loader, 8, 8), small.work)
    assert found.binding == "data" and found.step == pytest.approx(4096 / 8)
    slow_wire = replace(DEVICES["h100"], node_gbs=1e-3)
    found = estimate(settings("engine.micro_batch=64"), Cluster(slow_wire, 8, 8), small.work)
    assert found.binding == "communication"


def test_the_largest_micro_batch_that_fits_is_taken():
    work = Work(14_200_000, 1000)
    tight = replace(DEVICES["h100"], memory_gib=6.5)
    found = estimate(settings(), Cluster(tight, 8, 8), work)
    assert found.memories[1].total <= tight.room_gib * 2**30
    doubled = settings(f"engine.micro_batch={2 * found.split.micro_batch}")
    larger = estimate(doubled, Cluster(tight, 8, 8), work)
    assert larger.memories[1].total > tight.room_gib * 2**30
    assert "DOES NOT FIT" in report.text(larger)
    with pytest.raises(ConfigError, match=r"does not fit into 0\.01 GiB"):
        nothing = replace(tight, memory_gib=6.01)
        estimate(settings(), Cluster(nothing, 8, 8), work)


def test_gradient_checkpointing_is_seen():
    options = ["engine.micro_batch=8", "data.input_size=224"]
    plain, checkpointed = (
        estimate(settings(*options, f"engine.grad_checkpointing={on}"), EIGHT, Work(10**6, 1000))
        for on in ("false", "true")
    )
    assert checkpointed.trace.kept_bytes < 0.6 * plain.trace.kept_bytes
    assert checkpointed.trace.flops > 1.2 * plain.trace.flops


def test_picture_rises_and_falls(small):
    rows = report.picture(small.schedule).splitlines()
    top, fifth = rows[0].split("│")[1], rows[-5].split("│")[1]
    peak = small.schedule.warmup / small.schedule.total * report.PICTURE_WIDTH
    assert abs(top.index("█") - peak) <= 1
    # Column 1 of 63 is at 311,940 / 63 steps of 17,330: 2.57 of 9 rows high.
    assert fifth[:2] == " ▅"
    assert "1.0e-03" in rows[0] and "1.0e-05" in rows[-2]


def test_command_line(tmp_path, capsys):
    arguments = ["--config", str(IN22K), "--images", "14200000", "--classes", "100"]
    arguments += ["model.name=l2vit_mini", "data.input_size=64"]
    assert plan.main([*arguments, "--json", "--gpus", "64", "--price", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["nodes"]) == (311_940, 8)
    assert found["cost"] == pytest.approx(3 * found["gpu_hours"])
    own = tmp_path / "own.yaml"
    own.write_text(config.dump(replace(DEVICES["a100"], name="own")))
    assert plan.main([*arguments, "--device", str(own), "--gpus", "2", "--per-node", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION") and "2 × own (2 nodes)" in text
    for wrong, message in (
        (["--device", "tpu"], "'tpu' is not one of a100, h100, h200"),
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "3"], "cannot be divided over 3 ranks"),
        (["engine.zero_stag=2"], "did you mean engine.zero_stage"),
    ):
        assert plan.main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert plan.main(["--config", str(IN22K), "data.train=nowhere"]) == 2
    assert "give --images and --classes" in capsys.readouterr().err


def test_compare_shows_predicted_beside_actual(small, tmp_path):
    records = [
        {"step": s, "images": 100 * s, "time": 1e9 + s, "images_per_second": 50.0, "loss": 1.0}
        for s in (10, 20, 30)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    folder = tmp_path / "checkpoints" / "step-00000030"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_bytes(b"x" * 2**20)
    actual = compare.measured(tmp_path)
    assert actual["step_seconds"] == pytest.approx(2.0)
    assert actual["steps"] == 30 and actual["days"] == pytest.approx(20 / 86400)
    assert actual["checkpoint_gib"] == pytest.approx(1 / 1024)
    table = compare.text(report.values(small), actual)
    row = next(line for line in table.splitlines() if line.startswith("steps"))
    assert row.split()[1:] == ["3.119e+05", "30", "0.00"]


def test_built_in_devices_have_sensible_figures():
    for device in DEVICES.values():
        device.validate()
    with pytest.raises(ConfigError, match="memory_tbs"):
        replace(DEVICES["a100"], memory_tbs=0.0).validate()
    with pytest.raises(ConfigError, match="not found"):
        devices.find("nowhere.yaml")
