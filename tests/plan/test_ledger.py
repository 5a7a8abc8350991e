"""The ledger against counts by hand and against DeepSpeed's own step."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import l2vit  # noqa: F401
from l2vit.plan import estimate
from l2vit.plan.devices import DEVICES
from l2vit.plan.ledger import Ledger
from l2vit.plan.recorder import Operation, Recorder, kernels_recorded
from l2vit.plan.step_parts import model_part
from l2vit.plan.trace import Trace, trace
from l2vit.train.config import ModelConfig, RunConfig, ScheduleConfig, TrainConfig

ROOT = Path(__file__).parents[2]


def recorded(run) -> Recorder:
    recorder = Recorder()
    with kernels_recorded(recorder), recorder:
        run()
    return recorder


def meta(*shape, dtype=torch.bfloat16, **options):
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def names(recorder: Recorder) -> Counter:
    counted: Counter = Counter()
    for operation, number in recorder.operations.items():
        counted[operation.name] += number
    return counted


def test_a_linear_layer_by_hand():
    """Forward one product; backward two and the bias's sum; bytes of what each reads and writes."""
    layer, x = nn.Linear(64, 32).to("meta", torch.bfloat16), meta(128, 64, requires_grad=True)
    upstream = meta(128, 32)
    found = recorded(lambda: layer(x).backward(upstream))
    assert names(found) == {"addmm": 1, "mm": 2, "sum": 1}
    a, w, b, y = 128 * 64, 64 * 32, 32, 128 * 32
    moved = {"addmm": a + w + b + y, "mm": (y + w + a) + (y + a + w), "sum": y + b}
    for name, elements in moved.items():
        total = sum(op.bytes * n for op, n in found.operations.items() if op.name == name)
        assert total == 2 * elements, name
    assert sum(op.flops * n for op, n in found.operations.items()) == 3 * 2 * 128 * 64 * 32


def test_views_cost_nothing_and_copies_are_told_from_casts():
    x, y = meta(4, 6, 8), meta(5)

    def run():
        x.view(24, 8).t()[2:].unsqueeze(0).expand(3, -1, -1)  # views
        x.transpose(1, 2).contiguous()  # a copy
        x.contiguous()  # none needed
        x.float()  # a cast
        x.copy_(x.float())  # twice one
        torch._foreach_add_([x, y], 1.0)  # one launch

    found = recorded(run)
    assert names(found) == {"clone": 1, "_to_copy": 2, "copy_": 1, "_foreach_add_": 1}
    kinds = {op.name: op.kind for op in found.operations}
    assert kinds["clone"] == "layout copies"
    assert kinds["_to_copy"] == kinds["copy_"] == "casts"


def test_in_place_counts_its_tensor_once():
    x, y = meta(100), meta(100)
    found = recorded(lambda: x.add_(y))
    assert [op.bytes for op in found.operations] == [400]
    found = recorded(lambda: x[:50].mul_(2))  # what works on a view is no view
    assert [op.bytes for op in found.operations] == [100]


def test_convolutions_and_batch_norm_keep_channels_last():
    """As on a GPU: a copy before the next layer would be an artefact of the meta device."""
    model = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    model = model.to("meta")
    images = meta(2, 3, 8, 8, dtype=torch.float32).to(memory_format=torch.channels_last)
    outputs = []
    found = recorded(lambda: outputs.append(model(images)))
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    assert "clone" not in names(found)


def test_our_operators_are_followed_inside():
    """A depthwise layer, forward: its kernel, its output and the taps as (k·k, C)."""
    from l2vit.models.ops import triton_depthwise  # noqa: F401  registers the operator

    x, weight, bias = meta(2, 14, 14, 64), meta(64, 1, 7, 7), meta(64)
    found = recorded(lambda: torch.ops.l2vit.depthwise(x, weight, bias))
    assert names(found)["forward_kernel"] == 1
    (kernel,) = (op for op in found.operations if op.name == "forward_kernel")
    assert kernel.bytes == 2 * (2 * x.numel() + 64) + 4 * 49 * 64
    assert kernel.flops == 2 * 49 * x.numel()


def test_what_an_operator_of_ours_allocates_is_host_time_and_no_launch():
    """Forward: two kernels, their two outputs; an allocation in the open is a launch."""
    from l2vit.models.ops import triton_depthwise  # noqa: F401  registers the operator

    x, weight = meta(1, 4, 4, 64), meta(64, 1, 3, 3)

    def run():
        x.new_empty(3)
        torch.ops.l2vit.depthwise(x, weight, None)

    ledger = Ledger({"model": recorded(run).operations}, DEVICES["h100"], True)
    totals = ledger.totals()
    assert (totals.launches, totals.allocations) == (3, 2)
    assert totals.host_ms == pytest.approx(5 * 1e-3 * DEVICES["h100"].host_us)


def test_nothing_is_launched_that_is_not_counted():
    """Every operation of a model's step is in some kind; kinds and parts add up to the whole."""
    found = trace(
        lambda: timm.create_model("l2vit_mini", num_classes=10),
        batch=2,
        input_size=64,
        classes=10,
        dtype=torch.bfloat16,
    )
    other = Counter({Operation("allreduce_", "all-reduce", bytes=8.0): 3})
    ledger = Ledger({"model": found.operations, "engine": other}, DEVICES["h100"], True)
    totals, kinds = ledger.totals(), ledger.by_kind()
    assert totals.launches + totals.allocations == found.operations.total() + 3
    assert sum(sums.launches for sums in kinds.values()) == totals.launches
    assert sum(s.gigabytes for s in kinds.values()) == pytest.approx(totals.gigabytes)
    assert totals.predicted_ms == max(totals.device_ms, totals.host_ms)
    assert kinds["depthwise convolutions"].launches > 0
    assert kinds["linear attention"].launches > 0
    values = ledger.values()
    assert values["launches"] == totals.launches
    assert set(values) >= {"launches", "gigabytes", "copy_gigabytes", "by_kind", "predicted_ms"}
    assert "model and engine" in ledger.text()


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """The command itself on a small model."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.json"
    command = [sys.executable, "benchmarks/ledger.py", "--model", "l2vit_mini", "--batch", "8"]
    command += ["--classes", "10", "--json", str(path), "data.input_size=64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_the_command_counts_engine_and_augmentation(mini):
    parts = mini["parts"]
    assert {"model", "engine"} < set(parts)
    assert mini["launches"] == parts["model"]["launches"] + parts["engine"]["launches"]
    assert sum(kind["launches"] for kind in mini["by_kind"].values()) == mini["launches"]
    assert parts["model"]["teraflops"] > 0 and parts["engine"]["teraflops"] == 0
    # AdamW alone reads weight, gradient and two moments in fp32.
    parameters = sum(
        p.numel() for p in timm.create_model("l2vit_mini", num_classes=10).parameters()
    )
    assert parts["engine"]["gigabytes"] > 16e-9 * parameters


def test_the_plan_takes_the_engine_as_the_ledger_found_it(mini):
    model = timm.create_model("l2vit_mini", num_classes=10)
    sizes = [p.numel() for p in model.parameters()]
    found = estimate.engine_operations(
        Trace(Counter(), sum(sizes), len(sizes), 0, 0, True), accumulation=1, ranks=1
    )
    (operation,) = found
    engine = mini["parts"]["engine"]
    assert found.total() == pytest.approx(engine["launches"], rel=0.01)
    assert operation.bytes * found.total() / 1e9 == pytest.approx(engine["gigabytes"], rel=0.02)


def test_drop_path_and_loss_are_counted():
    x = meta(8, 10, dtype=torch.float32, requires_grad=True)
    found = recorded(lambda: F.log_softmax(x, 1).sum().backward())
    assert names(found)["_log_softmax"] == names(found)["_log_softmax_backward_data"] == 1


LAUNCHES, GIGABYTES, COPIES = 1500, 116.5, 0.5
"""Budgets of l2vit_base's step at batch 128; the goal for gigabytes is 105."""
ENGINE_LAUNCHES, ENGINE_GIGABYTES = 39, 4.0  # of the 88.6 M weights, see docs/performance.md


def test_a_step_of_l2vit_base_stays_within_its_budgets():
    """Model and engine: the model as traced here, the engine as its own test bounds it."""
    settings = TrainConfig(RunConfig("unused"), ModelConfig("l2vit_base", 0.2), ScheduleConfig(1))
    settings.engine.precision = "bf16"
    found = model_part(settings, batch=128, classes=21841)
    totals = Ledger({"model": found.operations}, DEVICES["h100"], True).totals()
    assert totals.launches + ENGINE_LAUNCHES <= LAUNCHES
    assert totals.gigabytes + ENGINE_GIGABYTES <= GIGABYTES
    assert totals.copy_gigabytes <= COPIES


def test_the_engine_does_not_work_weight_by_weight(mini):
    assert mini["parts"]["engine"]["launches"] <= ENGINE_LAUNCHES
