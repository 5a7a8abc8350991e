"""What may change when a run is continued, and what may not."""

import dataclasses

import pytest

from l2vit.config import dump
from l2vit.errors import ConfigError
from l2vit.train.config import ModelConfig, RunConfig, ScheduleConfig, TrainConfig
from l2vit.train.run_dir import changed_settings


@pytest.fixture
def config():
    return TrainConfig(RunConfig("runs/a"), ModelConfig("l2vit_mini"), ScheduleConfig(64))


@pytest.fixture
def saved(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    return path


def test_nothing_changed_and_nothing_saved(config, saved, tmp_path):
    assert changed_settings(saved, config) == []
    assert changed_settings(tmp_path / "none.yaml", config) == []


def test_what_may_change_is_told_but_for_the_directory(config, saved):
    config.run.dir = "elsewhere"
    config.engine.zero_stage = 3
    assert changed_settings(saved, config) == ["engine.zero_stage: 1 -> 3"]


def test_a_key_younger_than_the_run_had_its_default(config, saved):
    text = saved.read_text()
    saved.write_text(text.replace("task: classify\n", "").replace("  decay: 0.0\n", ""))
    assert saved.read_text().count("\n") == text.count("\n") - 2
    assert changed_settings(saved, config) == []
    config.ema.decay = 0.5
    assert changed_settings(saved, config) == ["ema.decay: 0.0 -> 0.5"]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "name", "l2vit_tiny"),
        ("model", "window_size", 12),
        ("model", "args", {"clamp": 1.0}),
        ("run", "seed", 1),
        ("schedule", "global_batch", 128),
    ],
)
def test_another_model_seed_or_batch_is_refused_by_name(config, saved, section, key, value):
    changed = dataclasses.replace(getattr(config, section), **{key: value})
    with pytest.raises(ConfigError, match=rf"{section}\.{key}"):
        changed_settings(saved, dataclasses.replace(config, **{section: changed}))
