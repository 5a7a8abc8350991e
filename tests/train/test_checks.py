"""Before a run starts: fine-tuning must begin somewhere."""

import pytest

from l2vit import config
from l2vit.errors import ConfigError
from l2vit.train import checks
from l2vit.train.config import TrainConfig


def settings(tmp_path, **init):
    tree = {"run": {"dir": str(tmp_path)}, "model": {"name": "m"}, "schedule": {"global_batch": 8}}
    return config.from_tree(TrainConfig, {**tree, "init": init})


def test_fine_tuning_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"init\.source=scratch trains without"):
        checks.require_first_weights(settings(tmp_path))
    given = settings(tmp_path, source="runs/22k")
    checks.require_first_weights(given)
    assert given.init.source == "runs/22k"


def test_from_scratch_where_it_is_asked_for(tmp_path):
    asked = settings(tmp_path, source="scratch")
    checks.require_first_weights(asked)
    assert asked.init.source == ""


def test_a_run_that_has_begun_goes_on_without(tmp_path):
    (tmp_path / "config.yaml").touch()
    checks.require_first_weights(settings(tmp_path))
