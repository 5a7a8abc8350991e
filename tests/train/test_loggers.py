"""Records in other loggers, written by the real clients offline and read by other means."""

import importlib.util
import json
import sqlite3
import struct
import threading

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from l2vit import config
from l2vit.errors import ConfigError
from l2vit.train import checks, histograms, loggers, metrics
from l2vit.train.config import TrainConfig

SETTINGS = {"log": {"project": "flowers"}, "optim": {"lr": 0.25, "betas": [0.9, 0.99]}}
SECRET = "0123456789" * 4


def write(run, sink, first, last, **options):
    """Begin, or continue after step ``first`` - 1, and record some steps."""
    door = metrics.Metrics(
        run, main=True, total_steps=9, resumed_step=first - 1, sinks=[sink], settings=SETTINGS
    )
    for step in range(first, last + 1):
        door.log(step, {"loss": 1 / step, "val/top1_percent": 10.0 * step}, images_seen=step)
    door.close()


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def wandb_records(path):
    """The protobuf records of an offline run's file, which is a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def test_wandb_continues_its_run(run, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    write(run, "wandb", 1, 3)
    write(run, "wandb", 3, 4)  # after a restart from step 2
    rows, ids = [], set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            ids |= {record.run.run_id} if record.HasField("run") else set()
            if record.HasField("run"):
                assert record.run.project == "flowers" and record.run.display_name == "run"
                given = {item.key: item.value_json for item in record.run.config.update}
                assert json.loads(given["optim.lr"]) == 0.25
            if record.HasField("history"):
                row = {"/".join(i.nested_key): i.value_json for i in record.history.item}
                rows.append((int(row["step"]), float(row["train/loss"])))
    assert rows == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 1 / 3), (4, 0.25)]
    assert len(ids) == 1
    for path in run.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert "warning" not in capfd.readouterr().err


def test_mlflow_continues_its_run(run, tmp_path, monkeypatch, capfd):
    from mlflow import MlflowClient

    store = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    write(run, "mlflow", 1, 3)
    write(run, "mlflow", 4, 5)
    write(tmp_path, "mlflow", 1, 1)  # another run
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("flowers").experiment_id
    named = {found.info.run_name: found for found in client.search_runs([experiment])}
    assert set(named) == {"run", tmp_path.name}
    ours = named["run"]
    assert ours.info.status == "FINISHED" and ours.data.params["optim.lr"] == "0.25"
    history = client.get_metric_history(ours.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s, 1 / s) for s in range(1, 6)]
    assert "warning" not in capfd.readouterr().err


def test_trackio_continues_its_run(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):  # read when it was imported
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    write(run, "trackio", 1, 2)
    write(run, "trackio", 3, 4)
    with sqlite3.connect(tmp_path / "trackio" / "flowers.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step")
        found = [(name, step, json.loads(values)["train/loss"]) for name, step, values in rows]
    name = f"run-{(run / loggers.ID_NAME).read_text().strip()}"
    assert found == [(name, step, 1 / step) for step in range(1, 5)]
    assert "warning" not in capfd.readouterr().err


# -- what goes wrong


class Failing:
    """A service that is down until ``up``."""

    up = False

    def __init__(self):
        self.got = []

    def log(self, step, values):
        if not self.up:
            raise OSError(f"https://me:{SECRET}@host/api: no route\nand more")
        self.got.append(step)

    def close(self):
        pass


def test_a_service_that_fails_is_told_of_once(capfd):
    client = Failing()
    sink = loggers.Background("mlflow", lambda: client)
    for step in range(3):
        sink.log(step, {})
    while not sink._waiting.empty():
        pass
    client.up = True
    sink.log(3, {})
    sink.close()
    assert client.got[-1] == 3
    said = capfd.readouterr().err
    assert said == "warning: mlflow: https://***@host/api: no route; training goes on\n"


def test_a_run_that_cannot_be_opened_is_tried_again_later(monkeypatch, capfd):
    now, client, tries = [0.0], Failing(), []
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now[0])
    client.up = True

    def connect():
        tries.append(now[0])
        if len(tries) == 1:
            raise SystemExit("no key")
        return client

    sink = loggers.Background("wandb", connect)
    for step, at in enumerate((1.0, 2.0, 2.0 + loggers.RETRY)):
        now[0] = at
        sink._guarded(lambda step=step: sink._send(step, {}))
    sink.close()
    assert tries == [1.0, 2.0 + loggers.RETRY] and client.got == [2]
    assert capfd.readouterr().err.count("warning: wandb: no key") == 1


def test_a_service_that_hangs_keeps_nobody_waiting(monkeypatch, capfd):
    monkeypatch.setattr(loggers, "QUEUE", 5)
    monkeypatch.setattr(loggers, "CLOSING", 0.05)
    answered = threading.Event()
    sink = loggers.Background("wandb", lambda: answered.wait() and Failing())
    for step in range(20):
        sink.log(step, {"loss": 1.0})
    sink.close()
    assert "records wait for it" in capfd.readouterr().err
    answered.set()


# -- before a rank starts


def settings(tmp_path, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text("model: {name: l2vit_mini}\nschedule: {global_batch: 8}\n")
    return config.load(TrainConfig, path, [f"run.dir={tmp_path / 'run'}", *overrides])


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    checks.can_be_logged(settings(tmp_path, "log.sinks=[tensorboard,mlflow]"))
    with pytest.raises(ConfigError) as refused:
        checks.check(settings(tmp_path, "log.sinks=[wandb]"))
    assert str(refused.value) == "log.sinks: wandb is not installed: pip install 'l2vit[loggers]'"
    assert refused.value.key == "log.sinks"
    with pytest.raises(ConfigError, match="'comet' is not one of tensorboard, wandb"):
        settings(tmp_path, "log.sinks=[comet]")


def test_credentials_have_no_place_in_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key log\.wandb"):
        settings(tmp_path, f"log.wandb.api_key={SECRET}")
    given = settings(tmp_path, f"data.train=https://me:{SECRET}@host/shards")
    with pytest.raises(ConfigError, match=r"data\.train: an address with a password") as refused:
        checks.check(given)
    assert SECRET not in str(refused.value)
    checks.can_be_logged(settings(tmp_path, "data.train=https://host:8080/@shards"))


# -- TensorBoard


def test_tensorboard_shows_the_configuration(run):
    write(run, "tensorboard", 1, 2)
    board = EventAccumulator(str(run))
    board.Reload()
    assert "train/loss" in board.Tags()["scalars"]
    text = board.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text) == SETTINGS
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["optim.lr"].number_value == 0.25
    assert shown["log.project"].string_value == "flowers"


def test_without_sinks_only_records_are_written(run):
    door = metrics.Metrics(run, main=True, total_steps=9, sinks=[], settings=SETTINGS)
    door.log(1, {"loss": 1.0}, images_seen=1)
    door.first_pictures(1, lambda: pytest.fail("nobody looks"))
    door.close()
    assert [path.name for path in run.iterdir()] == [metrics.JSONL]


def test_histograms_count_every_value():
    values = torch.cat([torch.randn(5000), torch.tensor([0.0, 1e-9, -1e9, 1e9, 100.0])])
    edges = np.array([-np.inf, *histograms.EDGES[:-1], np.inf])
    # numpy's bins hold their lower edge, ours their upper one: turn both round.
    expected = np.histogram(-values.numpy().astype(np.float64), -edges[::-1])[0][::-1]
    assert histograms.count(values).tolist() == expected.tolist()
