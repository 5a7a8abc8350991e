"""Evaluation, metrics, report, faults, watchdog and launch variables, without other processes."""

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from l2vit.data.batch import Batch
from l2vit.data.config import EvalSetConfig
from l2vit.errors import ConfigError, UserError
from l2vit.train import distributed, guards, metrics, model, report, throughput, watchdog
from l2vit.train.config import (
    FaultsConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from l2vit.train.denominators import Denominators
from l2vit.train.distributed import World
from l2vit.train.evaluation import Evaluator, _Set, class_columns, evaluate
from l2vit.train.run_record import RunRecord
from l2vit.train.state import TrainState
from l2vit.train.throughput import PhaseClock, Place

ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")


def batch(count, first=0):
    generator = torch.Generator().manual_seed(first)
    ids = np.arange(first, first + count)
    images = torch.randn(count, 3, 4, 4, generator=generator)
    return Batch(images, torch.from_numpy(ids % 7), ids, ids, 0)


def test_evaluation_counts_every_image_once():
    weight = torch.randn(48, 7, generator=torch.Generator().manual_seed(9))
    batches = [batch(5), batch(4, 5), batch(0, 9)]
    seen, widths = [], []

    def forward(images):
        widths.append(len(images))
        return images.flatten(1) @ weight

    tally = evaluate(
        forward, batches, world=ALONE, observe=lambda lo, la, ids: seen.extend(ids.tolist())
    )
    images = torch.cat([b.images for b in batches]).double()
    labels = torch.cat([b.labels for b in batches])
    logits = images.flatten(1) @ weight.double()
    order = logits.argsort(1, descending=True)
    places = (order == labels[:, None]).float().argmax(1)
    log_sum = torch.log(torch.exp(logits).sum(1))
    assert tally.count == 9 and seen == list(range(9))
    assert tally.top1 == int((places == 0).sum()) and tally.top5 == int((places < 5).sum())
    assert tally.loss == pytest.approx(float((log_sum - logits[range(9), labels]).sum()), rel=1e-5)
    assert widths == [5, 4, 1], "an empty batch must still compute, for ZeRO-3's sake"


def test_a_network_that_cannot_be_built_is_a_configuration_error():
    config = TrainConfig(RunConfig("unused"), ModelConfig("flatten_swin_mini"), ScheduleConfig(1))
    config.data.input_size = 256
    with pytest.raises(ConfigError, match="window of 7 does not divide the grid"):
        model.from_config(config, classes=10)
    config.model.args = {"attention": "quadratic"}
    with pytest.raises(ConfigError, match="unknown attention 'quadratic'; known: softmax"):
        model.from_config(config, classes=10)


@pytest.mark.parametrize(("draws", "at_once"), [(0, True), (1, False), (2, True)])
def test_a_run_begun_with_older_draws_keeps_them(draws, at_once):
    """Drop path: block by block as timm draws it, or for the whole network."""
    config = TrainConfig(
        RunConfig("unused", draws=draws), ModelConfig("l2vit_mini", 0.5), ScheduleConfig(1)
    )
    network = model.from_config(config, classes=10).train()
    drawn = network.draw_paths(torch.zeros(2, 1, 1, 32))
    assert all((part is not None) == at_once for part in drawn)


@pytest.mark.parametrize("name", ["inline_swin_mini", "vit_tiny_patch16_224", "l2vit_mini"])
def test_an_evaluation_size_is_tried_before_training(name):
    config = TrainConfig(RunConfig("unused"), ModelConfig(name), ScheduleConfig(1))
    config.data.input_size = 64
    config.eval.extra = {"large": EvalSetConfig("somewhere", input_size=96)}
    network = model.from_config(config, classes=10)
    if name == "l2vit_mini":  # takes any size
        model.check_evaluation_sizes(network, config.eval, name=name, input_size=64)
        return
    with pytest.raises(ConfigError, match=r"eval\.extra\.large\.input_size: .* cannot take 96"):
        model.check_evaluation_sizes(network, config.eval, name=name, input_size=64)


def test_an_evaluation_set_with_some_of_the_classes():
    assert class_columns(("a", "b"), ("a", "b"), "val") is None
    assert class_columns(("a", "b", "c"), ("c", "x", "a"), "val").tolist() == [2, -1, 0]
    with pytest.raises(ConfigError, match="val has no class in common"):
        class_columns(("a",), ("x",), "val")


def test_metrics_go_through_one_door_and_are_cut_back(tmp_path, capsys):
    door = metrics.Metrics(tmp_path, main=True, total_steps=10)
    for step in range(1, 7):
        door.log(step, {"loss": 1 / step, "images_per_second": 10.0}, images_seen=step * 8)
    door.histogram(6, "denominators/x", [1.0, 2.0], [1.0, 10.0])
    door.close()
    with (tmp_path / metrics.JSONL).open("a") as stream:
        stream.write('{"step": 7, "lo')  # cut short by a kill
    time.sleep(1.1)  # event files are read in the order of their names, which begin with seconds
    again = metrics.Metrics(tmp_path, main=True, total_steps=10, resumed_step=4)
    again.log(5, {"loss": 0.1}, images_seen=40)
    again.close()
    found = metrics.read(tmp_path / metrics.JSONL)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    assert found[-1]["loss"] == 0.1
    assert "step 5/10  loss 0.1000" in capsys.readouterr().out

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_other_ranks_write_nothing(tmp_path):
    door = metrics.Metrics(tmp_path, main=False, total_steps=10)
    door.log(1, {"loss": 1.0}, images_seen=8)
    door.say("nothing")
    door.close()
    assert not list(tmp_path.iterdir())


def carried(page):
    """The data of every chart of a page, as its script reads them."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', page)
    return [json.loads(text) for text in found]


def test_the_report_draws_what_was_measured(tmp_path):
    records = [
        {"step": s, "images": 8 * s, "time": 100.0 + s, "loss": 2.0 / s, "val/top1_percent": s}
        for s in range(1, 40)
    ]
    run = RunRecord("a <run>", finished=True, records=records)
    page = report.page(run)
    assert "a &lt;run&gt;" in page and page.count("<svg") == 2
    loss = next(c for c in carried(page) if c["series"][0]["name"] == "loss")
    assert loss["series"][0]["points"] == [[s, 2.0 / s] for s in range(1, 40)]
    assert dict(report.summary(run))["val/top1_percent"] == "39.000 (best 39.000 at step 39)"
    assert report.page(RunRecord("empty")).count("<svg") == 0
    assert metrics.clock(3 * 86400 + 3723) == "3 d 01:02:03"


def test_a_run_of_one_step_has_a_report(tmp_path):
    """Every curve has one value; ending with an error would come after DONE was written."""
    door = metrics.Metrics(tmp_path, main=True, total_steps=1)
    door.log(1, {"loss": 2.0, "learning_rate": 1e-3, "val/top1_percent": 0.0}, images_seen=8)
    report.finish(tmp_path, door, main=True, done=True)
    door.close()
    page = (tmp_path / report.NAME).read_text()
    assert page.count("<svg") == 3
    assert [[1, 2.0]] in [c["series"][0]["points"] for c in carried(page)]


def test_the_end_tells_of_replaced_samples(tmp_path, capsys):
    door = metrics.Metrics(tmp_path, main=True, total_steps=1)
    door.log(1, {"loss": 1.0}, images_seen=8)
    report.finish(tmp_path, door, main=True, done=True)
    assert "bad samples" not in capsys.readouterr().out
    (tmp_path / "bad_samples.jsonl").write_text('{"sample_id": 3}\n{"sample_id": 5}\n{"sam')
    report.finish(tmp_path, door, main=True, done=True)
    assert "2, listed in" in capsys.readouterr().out
    door.close()


def test_skipped_steps_are_counted_in_a_row(tmp_path):
    state = TrainState()
    options = {"limit": 2, "run": tmp_path, "step": 7}
    for applied, in_row in ((False, 1), (False, 2), (True, 0), (False, 1)):
        guards.count_skipped(state, applied=applied, scaling=False, **options)
        assert state.skipped_in_row == in_row
    for _ in range(9):  # fp16 looking for its loss scale is no fault
        guards.count_skipped(state, applied=False, scaling=True, **options)
    guards.count_skipped(state, applied=False, scaling=False, **options)
    with pytest.raises(UserError, match=r"3 steps in a row.*optim\.lr"):
        guards.count_skipped(state, applied=False, scaling=False, **options)
    assert state.skipped_steps == 14


def test_a_spike_is_far_above_the_running_median():
    state, config = TrainState(), FaultsConfig(spike_factor=3.0)
    assert not guards.is_spike(50.0, state, config), "too early to tell"
    for _ in range(guards.SPIKE_WARMUP):
        assert not guards.is_spike(2.0, state, config)
    assert not guards.is_spike(5.9, state, config)
    assert guards.is_spike(6.1, state, config)
    assert guards.is_spike(6.1, state, config), "a spike must not raise the median"
    assert not guards.is_spike(float("nan"), state, config)
    assert not guards.is_spike(1e9, state, FaultsConfig())


def test_the_rank_that_came_least_far_is_the_cause():
    ahead, behind = Place(9, "reduce", 3), Place(7, "data", 3)
    assert watchdog.culprits([ahead, behind, ahead]) == [1]
    assert "rank 1 made no progress for 12 s in phase data of step 3" in watchdog.describe(
        [ahead, behind, ahead], 12.3
    )
    waiting = Place(7, "backward", 3, waiting=True)
    assert watchdog.culprits([waiting, Place(7, "backward", 3)]) == [1]
    assert "does not answer" in watchdog.describe([ahead, None], 5)
    assert "network" in watchdog.describe([waiting, waiting], 5)


def test_a_machine_that_was_suspended_is_no_hang(monkeypatch):
    """A minute passes within the third beat; then a step is made."""
    now, waits, clock = [0.0], iter([1.0, 1.0, 60.0, 1.0]), PhaseClock()
    dog = watchdog.Watchdog(clock, world=ALONE, limit=0)

    def wait(seconds):
        now[0] += next(waits, 0.0)
        return now[0] > 64

    for module in ("l2vit.train.throughput.time", "l2vit.train.watchdog.time"):
        monkeypatch.setattr(module, SimpleNamespace(monotonic=lambda: now[0]))
    clock._since = 0.0
    monkeypatch.setattr(dog, "_stop", SimpleNamespace(wait=wait))
    beats = dog._beats(1.0)
    assert [next(beats)[1] for _ in range(4)] == [1, 2, 4, 5]
    with clock("data"):
        now[0] += 0.25
        assert next(beats)[1] == 0.25


def test_phases_are_timed_and_counted():
    clock = PhaseClock()
    for phase in ("data", "forward"):
        with clock(phase):
            place, _ = clock.place()
            assert place.phase == phase
    assert clock.place()[0].count == 2 and set(clock.seconds) == {"data", "forward"}


def test_each_batch_of_an_evaluation_is_progress():
    """An evaluation may take longer than ``faults.hang_seconds``; a batch of it may not."""
    clock, seen = PhaseClock(), []

    def infer(images):
        seen.append(clock.place()[0])
        return torch.zeros(len(images), 7)

    network = SimpleNamespace(eval=lambda: None, train=lambda: None)
    engine = SimpleNamespace(infer=infer, ema=None, module=network, average_buffers=lambda: None)
    config = TrainConfig(RunConfig("r"), ModelConfig("m"), ScheduleConfig(8))
    sections = (config.data, config.eval, config.augment)
    evaluator = Evaluator(*sections, (), world=ALONE, beat=clock.beat)
    evaluator._sets = [_Set("val", [batch(5), batch(4, 5), batch(0, 9)], None)]
    with clock("evaluate"):
        evaluator.run(engine)
    assert [(place.count, place.phase) for place in seen] == [(n, "evaluate") for n in (2, 3, 4)]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1, "none")),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1, 4, "torchrun")),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            (3, 4, 1, 2, "torchrun"),
        ),
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "1",
                "SLURM_NTASKS_PER_NODE": "4",
            },
            (5, 8, 1, 4, "slurm"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0, 1, "none")),  # a batch script
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            (1, 2, 1, 2, "mpi"),
        ),
    ],
)
def test_who_am_i(variables, expected):
    if torch.cuda.is_available() and expected[2] >= torch.cuda.device_count():
        pytest.skip("needs as many GPUs as ranks")
    world = distributed.from_environment(variables)
    assert (world.rank, world.size, world.local_rank, world.local_size, world.launcher) == expected


def test_contradictory_variables_are_refused():
    with pytest.raises(ConfigError, match="RANK=4"):
        distributed.from_environment({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    with pytest.raises(ConfigError, match="WORLD_SIZE='many' is not a number"):
        distributed.from_environment({"RANK": "0", "WORLD_SIZE": "many", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],cpu1", "gpu07"), ("node1", "node1"), ("a,b", "a"), ("n[3]", "n3")],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert distributed.first_host(nodes) == first


def test_denominators_are_counted_by_layer(tmp_path):
    import timm

    import l2vit  # noqa: F401

    model = timm.create_model("l2vit_mini", num_classes=3, window_size=4)
    seen = {}
    for name, module in model.named_modules():
        if hasattr(module, "observer"):
            seen[name] = []
            module.observer = lambda values, kept=seen[name]: kept.append(values.flatten())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(images)
    expected = {name: 100 * (torch.cat(v) < 100).double().mean() for name, v in seen.items()}
    denominators = Denominators(model, world=ALONE)
    door = metrics.Metrics(tmp_path, main=True, total_steps=1)
    with denominators.watch(), torch.no_grad():
        model(images)
    shares = denominators.report(door, 1)
    door.close()
    assert len(shares) == 4
    for name, percent in expected.items():
        assert shares[f"clamped_percent/{name}"] == pytest.approx(float(percent))
    assert all(m.observer is None for m in model.modules() if hasattr(m, "observer"))


def test_the_peak_of_a_device_can_be_given():
    assert throughput.peak_tflops(LogConfig(peak_tflops=12.5), torch.device("cpu")) == 12.5
    assert throughput.peak_tflops(LogConfig(), torch.device("cpu")) == 0.0


def test_state_survives_json():
    assert TrainState.from_dict({}).draws == 1  # what runs had before there was a choice
    state = TrainState(step=3, images_seen=48, recent_losses=[1.5, 2.5], seed=9)
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
