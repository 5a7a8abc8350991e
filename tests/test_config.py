"""Strict configuration: what is refused, and that the error names the fix."""

import pytest
import yaml

from l2vit import config
from l2vit.errors import ConfigError
from l2vit.train.config import TrainConfig

MINIMAL = {"run": {"dir": "r"}, "model": {"name": "l2vit_mini"}, "schedule": {"global_batch": 8}}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


def test_defaults_overrides_and_round_trip(path, tmp_path):
    first = config.load(
        TrainConfig, path, ["optim.lr=4e-3", "data.train=/x", "optim.betas=[0.8,1]"]
    )
    assert first.optim.lr == 4e-3 and first.data.train == "/x"
    assert first.optim.betas == (0.8, 1.0)
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.dump(first))
    assert config.load(TrainConfig, saved) == first


def test_a_base_file_lies_below(path, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("base: run.yaml\nschedule: {length: 3 epochs}\n")
    loaded = config.load(TrainConfig, child)
    assert (loaded.schedule.global_batch, loaded.schedule.length) == (8, "3 epochs")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean optim.lr?"]),
        ("optim.lr=fast", ["optim.lr", "expected float", "fast"]),
        ("optim.lr=-1", ["optim.lr", "positive"]),
        ("engine.zero_stage=0", ["engine.zero_stage", "1, 2, 3"]),
        ("engine.compile=1", ["engine.compile", "expected bool"]),
        ("schedule.global_batch=true", ["schedule.global_batch", "expected int"]),
        ("augment.scale=[1]", ["augment.scale", "2 values"]),
        ("data.subset.fraction=2", ["data.subset.fraction", "(0, 1]"]),
        ("data=3", ["data", "section"]),
        ("nonsense", ["nonsense", "key.sub=value"]),
    ],
)
def test_refusals_name_the_key(path, override, words):
    with pytest.raises(ConfigError) as caught:
        config.load(TrainConfig, path, [override])
    for word in words:
        assert word in str(caught.value)


def test_a_missing_required_key_is_named(path):
    path.write_text("run: {dir: r}\nmodel: {name: m}\n")
    with pytest.raises(ConfigError, match="schedule is required"):
        config.load(TrainConfig, path)


def test_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        config.load(TrainConfig, tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="not readable YAML"):
        config.load(TrainConfig, broken)
