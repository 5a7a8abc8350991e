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
        TrainConfig, path, ["optim.lr=4e-3", "data.train=/x", "optim.betas=[0,0.99]"]
    )
    assert first.optim.lr == 4e-3 and first.data.train == "/x"
    assert first.optim.betas == (0.0, 0.99)
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
        ("optim.lr=fast", ["optim.lr", "expected a finite number", "fast"]),
        ("optim.lr=-1", ["optim.lr", "positive"]),
        ("engine.zero_stage=0", ["engine.zero_stage", "1, 2, 3"]),
        ("engine.compile=1", ["engine.compile", "expected bool"]),
        ("schedule.global_batch=true", ["schedule.global_batch", "expected int"]),
        ("augment.scale=[1]", ["augment.scale", "2 values"]),
        ("data.subset.fraction=2", ["data.subset.fraction", "(0, 1]"]),
        ("optim.lr=nan", ["optim.lr", "expected a finite number"]),
        ("optim.lr=1e999", ["optim.lr", "expected a finite number"]),
        ("schedule.min_lr=-1", ["schedule.min_lr: -1", "at least 0"]),
        ("schedule.start_lr=1", ["schedule.start_lr: 1.0 is above the peak, optim.lr=0.001"]),
        ("optim.betas=[1.5,2]", ["optim.betas[0]: 1.5 must be in [0, 1)"]),
        ("optim.eps=-1", ["optim.eps: -1.0 must be at least 0"]),
        ("model.drop_path_rate=1.5", ["model.drop_path_rate: 1.5 must be in [0, 1)"]),
        ("eval.batch=0", ["eval.batch: 0 must be at least 1"]),
        ("checkpoint.every=1 epok", ["checkpoint.every: '1 epok' is not a duration such as"]),
        ("schedule.length=", ["schedule.length: '' is not a duration such as"]),
        ("run.dir=", ["run.dir: '' must not be empty"]),
        ("run.dir=~", ["run.dir: '' must not be empty"]),
        ("optim.lr=", ["optim.lr: expected a finite number, found nothing"]),
        ("model.args={a: 1, a: 2}", ["key 'a' is given twice"]),
        ("eval.extra={real: {input_size: 8}}", ["eval.extra.real.data is required"]),
        ("eval.extra.real.input_size=-1", ["eval.extra.real.", "data is required"]),
        ("faults.spike_factor=0.5", ["faults.spike_factor: 0.5 must be 0 or above 1"]),
        ("optim..lr=1", ["key.sub=value"]),
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
    with pytest.raises(ConfigError, match=r"schedule\.global_batch is required"):
        config.load(TrainConfig, path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not readable YAML"),
        ("optim: {lr: 1}\ndata: {}\noptim: {eps: 1}", "key 'optim' is given twice"),
        ("optim: {lr: 1, lr: 2}", "key 'lr' is given twice"),
        ("base: broken.yaml", "base: broken.yaml is based on this file in turn"),
        ("base: other.yaml", "base: broken.yaml is based on this file in turn"),
        ("base: [run.yaml]", "base: expected the name of a YAML file"),
        ("base: ~", "run.dir is required: set it in the file or as run.dir=VALUE"),
        ("base: ''", "base: expected the name of a YAML file"),
        ("base: none.yaml", "none.yaml (the base of broken.yaml)"),
        ("base: .", "not readable YAML"),
        ("- 1", "expected a mapping of settings, found list"),
    ],
)
def test_broken_files(tmp_path, text, words):
    broken = tmp_path / "broken.yaml"
    broken.write_text(text)
    (tmp_path / "other.yaml").write_text("base: broken.yaml")
    with pytest.raises(ConfigError) as caught:
        config.load(TrainConfig, broken)
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        config.load(TrainConfig, tmp_path / "none.yaml")


def test_the_file_or_override_at_fault_is_named(path, tmp_path):
    """The key may stand in a base, in the file itself, or on the command line."""
    base = tmp_path / "base.yaml"
    base.write_text("base: run.yaml\noptim: {lr: -1, eps: -2}\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml\noptim: {eps: -3}\n")
    cases = {
        (): f"{base}: optim.lr: -1",
        ("optim.lr=1",): f"{child}: optim.eps: -3",
        ("optim.lr=-5",): "override optim.lr=-5: optim.lr: -5",
        ("optim={lr: -6}",): "override optim={lr: -6}: optim.lr: -6",
        ("optim.lr=1", "optim.eps=1", "data.inptu_size=3"): "override data.inptu_size=3: unknown",
    }
    for overrides, beginning in cases.items():
        with pytest.raises(ConfigError) as caught:
            config.load(TrainConfig, child, overrides)
        assert str(caught.value).startswith(beginning)


def test_nothing_means_no_text_and_an_empty_section_its_defaults(path):
    path.write_text(f"{path.read_text()}data:\noptim: ~\n")
    loaded = config.load(TrainConfig, path, ["data.val=", "init.source=~", "data.threads=3"])
    assert (loaded.data.val, loaded.init.source, loaded.data.threads) == ("", "", 3)
    assert loaded.optim == TrainConfig.__dataclass_fields__["optim"].default_factory()


def test_yaml_anchors_may_repeat_what_they_merge(path):
    path.write_text(f"{path.read_text()}optim: &o {{lr: 1}}\nmodel:\n  args: {{<<: *o, lr: 2}}\n")
    path.write_text(path.read_text().replace("model: {name: l2vit_mini}\n", ""))
    path.write_text(path.read_text().replace("model:\n  name: l2vit_mini\n", ""))
    loaded = config.load(TrainConfig, path, ["model.name=m", "optim.lr=1"])
    assert loaded.model.args == {"lr": 2}


def test_what_is_built_in_code_is_checked_alike():
    built = config.from_tree(TrainConfig, MINIMAL)
    config.check(built)
    built.optim.eps = -1.0
    with pytest.raises(ConfigError, match=r"optim\.eps: -1.0 must be at least 0"):
        config.check(built)
