"""Before a run starts: weights to begin with, a batch the ranks can share, the right task."""

import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep
from l2vit import config
from l2vit.errors import ConfigError
from l2vit.launch import command
from l2vit.train import checks
from l2vit.train.config import TrainConfig
from pretrain import plan, preview


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


# -- the batch over the ranks


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    images, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("shards")
    for i in range(4):
        (images / f"class{i % 2}").mkdir(exist_ok=True)
        Image.effect_noise((64, 64), 20 + 20 * i).convert("RGB").save(
            images / f"class{i % 2}" / f"{i}.jpg"
        )
    command = ["build", "--dataset", "folder", "--source", str(images), "--out", str(out)]
    assert data_prep([*command, "--split", "train", "--workers", "1"]) == 0
    return out


@pytest.mark.parametrize(
    ("batch", "micro_batch", "mixup", "ranks", "told"),
    [
        (8, 0, 0.0, 3, "schedule.global_batch: 8 cannot be divided over 3 ranks"),
        (8, 0, 0.2, 2, r"over 2 ranks in micro-batches that are multiples of 8"),
        (8, 3, 0.0, 2, r"engine.micro_batch: 3 does not divide .* possible .*: 4×1, 2×2, 1×4"),
        (8, 0, 0.0, 4, None),
        (16, 8, 0.2, 2, None),
    ],
)
def test_the_batch_divides_over_the_ranks(tmp_path, shards, batch, micro_batch, mixup, ranks, told):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run: {{dir: {tmp_path}}}\nmodel: {{name: l2vit_mini}}\n"
        f"schedule: {{global_batch: {batch}}}\nengine: {{micro_batch: {micro_batch}}}\n"
        f"augment: {{mixup: {mixup}, cutmix: 0, mix_group: 8}}\n"
        f"data: {{train: {shards}}}\n"
    )
    given = ["--config", str(file)]
    if told is None:
        command.check_ranks(given, ranks)
    else:
        with pytest.raises(ConfigError, match=told) as refused:
            command.check_ranks(given, ranks)
        assert str(file) in str(refused.value)


@pytest.mark.parametrize("program", [plan, preview])
def test_programs_for_classification_say_so_of_other_recipes(program, tmp_path, capsys):
    recipe = "finetune/configs/quickstart_detect.yaml"
    arguments = ["--out", str(tmp_path / "page.html")] if program is preview else []
    assert program.main(["--config", recipe, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert recipe in line and "task: detect; pretrain" in line and "classify only" in line
