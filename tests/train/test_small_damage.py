"""Damage around sound checkpoints: set aside with a warning, and the run goes on."""

import json

import pytest

from l2vit.config import dump
from l2vit.train import checkpoint, metrics, run_dir
from l2vit.train.config import ModelConfig, RunConfig, ScheduleConfig, TrainConfig
from l2vit.train.distributed import from_environment
from l2vit.train.report import page
from l2vit.train.run_record import RunRecord

LENGTH = ["90 epochs", "0 epochs"]


@pytest.fixture
def config(tmp_path):
    """A run that has saved step 8 and recorded ten steps."""
    config = TrainConfig(
        RunConfig(str(tmp_path / "run")), ModelConfig("l2vit_mini"), ScheduleConfig(64)
    )
    run = tmp_path / "run"
    saved = checkpoint.step_directory(run, 8)
    saved.mkdir(parents=True)
    (saved / checkpoint.META_NAME).write_text("{}")
    (run / "config.yaml").write_text(dump(config))
    lines = [{"step": s, "images": 8 * s, "time": 100.0 + s, "loss": 2.0} for s in range(1, 11)]
    (run / metrics.JSONL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def prepare(config):
    return run_dir.prepare(config, from_environment({}))


def aside(run):
    return sorted(path.name.rpartition("-")[0] for path in run.glob("damaged-*"))


@pytest.mark.parametrize("content", ["", "[]", "run: [", "model: {name: l2vit_mini}\n", "\x00"])
def test_a_damaged_configuration_is_set_aside(content, config, capfd):
    path = prepare(config) / "config.yaml"
    assert capfd.readouterr().err == ""
    path.write_text(content)
    run = prepare(config)
    assert aside(run) == ["damaged-config.yaml"]
    assert "config.yaml is damaged; kept as damaged-config.yaml" in capfd.readouterr().err
    assert path.read_text() == dump(config)


@pytest.mark.parametrize("content", ["", "[]", '{"step": 8, "len', "8", "null", "{}"])
def test_a_damaged_done_is_set_aside(content, config, capfd):
    run = prepare(config)
    (run / "DONE").write_text(content)
    assert not run_dir.finished(run, LENGTH)
    prepare(config)
    assert aside(run) == ["damaged-DONE"] and "DONE is damaged" in capfd.readouterr().err
    (run / "DONE").write_text(json.dumps({"length": LENGTH}))
    prepare(config)
    assert run_dir.finished(run, LENGTH) and not run_dir.finished(run, ["91 epochs", "0 epochs"])


@pytest.mark.parametrize("harm", [b"\xff", b'"step": "x"', b'{"step": 3.5}', b"[1]", b'{"a": {}}'])
def test_damaged_records_are_left_out(harm, config, capfd):
    run = prepare(config)
    path = run / metrics.JSONL
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:5] + harm + lines[2][6:] if harm == b"\xff" else harm + b"\n"
    path.write_bytes(b"".join(lines))
    assert run_dir.reached(run) == run_dir.Reached(10, 8)
    metrics.Metrics(run, main=True, total_steps=20, resumed_step=8).close()
    assert [record["step"] for record in metrics.read(path)] == [1, 2, 4, 5, 6, 7, 8]
    assert aside(run) == ["damaged-metrics.jsonl"]
    assert "has damaged lines" in capfd.readouterr().err
    assert "<svg" in page(RunRecord.load(run))


def test_every_flipped_bit_of_the_records_can_be_lived_with(config):
    path = prepare(config) / metrics.JSONL
    data = path.read_bytes()
    for at in range(0, len(data), 3):
        harmed = bytearray(data)
        harmed[at] ^= 1 << at % 8
        path.write_bytes(harmed)
        run_dir.reached(path.parent)
        page(RunRecord.load(path.parent))


def test_a_line_cut_short_by_a_kill_is_no_damage(config, capfd):
    run = prepare(config)
    with (run / metrics.JSONL).open("a") as stream:
        stream.write('{"step": 11, "lo')
    metrics.Metrics(run, main=True, total_steps=20, resumed_step=8).close()
    assert aside(run) == [] and capfd.readouterr().err == ""


@pytest.mark.parametrize("what", ["file", "directory", "dangling link"])
def test_only_an_interrupted_save_is_deleted(what, config, capfd):
    """What stands in place of a checkpoint or of its index is kept, with the parts beside it."""
    run = prepare(config)
    capfd.readouterr()
    torn, odd = (checkpoint.step_directory(run, step) for step in (12, 16))
    torn.mkdir()
    (torn / checkpoint.part_name(0, 1)).write_bytes(b"half")
    if what == "file":
        odd.write_bytes(b"weights")
    else:
        odd.mkdir()
        (odd / checkpoint.part_name(0, 1)).write_bytes(b"weights")
        index = odd / checkpoint.META_NAME
        index.mkdir() if what == "directory" else index.symlink_to("nowhere")
    prepare(config)
    told = capfd.readouterr().err
    assert "the save of step 12 was interrupted" in told and "is no checkpoint; kept as" in told
    (kept,) = (run / checkpoint.FOLDER).glob("damaged-step-00000016-*")
    held = kept if what == "file" else kept / checkpoint.part_name(0, 1)
    assert held.read_bytes() == b"weights"
    assert not torn.exists() and checkpoint.complete_steps(run) == [8]
