"""A run of two ranks is continued in other loggers, and its histograms count what it saved."""

import pytest
from forked_ranks import Ranks
from mlflow import MlflowClient
from small_runs import losses, settings, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from l2vit.train import checkpoint
from l2vit.train.checkpoint import Reader

pytestmark = pytest.mark.ci
SINKS = {"log__sinks": ["tensorboard", "wandb", "mlflow"], "log__histograms_every": 4}


def run_for(shards, tmp_path, name, steps, **changes):
    path = settings(shards, tmp_path / name, schedule__length=steps, **changes)
    environment = {"WANDB_MODE": "offline"}
    ranks = Ranks(train, 2, path, directory=tmp_path, raw=True, environment=environment)
    assert ranks.wait() == [0, 0], ranks.log(0)[-3000:]
    assert "warning" not in ranks.log(0)
    return tmp_path / name


def test_a_run_is_continued_in_its_loggers(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # to read what the run has written
    run = run_for(shards, tmp_path, "run", "8 steps", **SINKS)
    run_for(shards, tmp_path, "run", "12 steps", **SINKS)  # the same run, made longer

    client = MlflowClient((run / "mlruns").as_uri())
    (experiment,) = (e for e in client.search_experiments() if e.name == "l2vit")
    (ours,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(ours.info.run_id, "train/loss")
    assert {m.step: m.value for m in history} == losses(run) and max(losses(run)) == 12
    ids = {path.stem for path in run.glob("wandb/offline-run-*/*.wandb")}
    assert len(list(run.glob("wandb/offline-run-*"))) == 2 and len(ids) == 1

    board = EventAccumulator(str(run), size_guidance={"histograms": 0})
    board.Reload()
    reader = Reader(checkpoint.find(run))
    for key in (key for key in reader.tensors if key.startswith("param/")):
        last = board.Histograms(f"parameters/{key.removeprefix('param/')}")[-1]
        values = reader.read(key)
        assert last.step == 12
        shown = last.histogram_value
        assert sum(shown.bucket) == shown.num == values.numel()
        negative = sum(
            n for n, limit in zip(shown.bucket, shown.bucket_limit, strict=True) if limit < 0
        )
        assert negative == int((values <= -1e-6).sum()), key
