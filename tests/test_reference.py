"""The reference of keys: complete, current, and at hand on the command line."""

import dataclasses
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from l2vit import config
from l2vit.config import reference
from l2vit.errors import ConfigError
from l2vit.launch import __main__ as launch
from l2vit.train import tasks
from l2vit.train.config import OptimConfig, TrainConfig
from pretrain import keys
from pretrain.train import main as train

ROOT = Path(__file__).parents[1]
MINIMAL = {"run": {"dir": "r"}, "model": {"name": "m"}, "schedule": {"global_batch": 8}}


def leaves(tree, where=""):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}"


@pytest.mark.parametrize("task", tasks.names())
def test_every_key_of_every_task_has_a_meaning(task):
    settings = tasks.kind(task).settings()
    assert [k.name for k in reference.keys(settings) if not k.meaning] == []


def test_a_task_of_its_own_shows_only_what_is_its_own():
    @dataclasses.dataclass
    class Other:
        optim: OptimConfig
        data: int = 3
        """A number."""
        boxes: float = 1.0
        """Boxes."""

    page = reference.markdown(Other, {}, without=TrainConfig)
    assert "boxes" in page and "optim" not in page


def test_every_key_is_there():
    """Counted from a resolved configuration, which holds every key."""
    written = yaml.safe_load(config.dump(config.from_tree(TrainConfig, MINIMAL)))
    found = reference.keys(TrainConfig)
    assert {k.name for k in found if ".NAME" not in k.name} == set(leaves(written))


def test_defaults_are_what_a_run_gets():
    built = config.to_tree(config.from_tree(TrainConfig, MINIMAL))
    for key in reference.keys(TrainConfig):
        if key.required or ".NAME" in key.name:
            continue
        value = built
        for part in key.name.split("."):
            value = value[part]
        shown = yaml.safe_load(key.default)
        if isinstance(value, list) and not isinstance(
            next(iter(value), 0), str
        ):  # shown with six digits
            assert shown == pytest.approx(value, rel=1e-5), key.name
        else:
            assert float(shown) == value if isinstance(value, float) else shown == value, key.name


def test_the_page_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == keys.page(), (
        "run python -m pretrain keys --markdown > docs/configuration.md"
    )


def test_the_page_names_recipes():
    used = keys.recipes_by_key("classify")
    assert "in1k_tiny" in used["optim.lr"] and "optim.lrr" not in used
    assert "quickstart_finetune" in used["init.head"]


@pytest.mark.parametrize(
    "arguments",
    [["--help", "optim.lr"], ["-h", "optim.lr"], ["--keys"]],
)
@pytest.mark.parametrize("program", ["launch", "train"])
def test_keys_on_the_launchers(program, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        if program == "launch":
            launch.main(["launch/pretrain.sh", *arguments])
        else:
            train(arguments)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "optim.lr  (number positive; default 0.001)\n    Peak learning rate" in said
    assert ("data.train" in said) == (arguments == ["--keys"])


def test_an_unknown_key_names_close_ones(capsys):
    assert keys.main(["batch"]) == 2
    assert "no key or section batch; similar: eval.batch" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"similar: .*optim\.betas"):
        reference.find(TrainConfig, "optim.beta")
    assert keys.main(["optim", "--names"]) == 0
    names = capsys.readouterr().out.split()
    section = get_type_hints(TrainConfig)["optim"]
    assert names == [f"optim.{field.name}" for field in dataclasses.fields(section)]
