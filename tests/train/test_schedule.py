"""The learning rate against closed forms at every step, durations, groups and splits."""

import math

import numpy as np
import pytest
import timm
import torch

import l2vit  # noqa: F401
from l2vit.config import check, load
from l2vit.data import order
from l2vit.errors import ConfigError
from l2vit.train import param_groups, startup
from l2vit.train.config import OptimConfig, ScheduleConfig, TrainConfig
from l2vit.train.schedule import Duration, Schedule, interval_of

IMAGENET_22K = 14_197_122


def build(steps_per_epoch, optim=None, **settings):
    return Schedule.build(
        ScheduleConfig(**settings), OptimConfig(**(optim or {})), steps_per_epoch=steps_per_epoch
    )


def test_every_step_of_the_22k_recipe():
    per_epoch = IMAGENET_22K // 4096
    schedule = build(
        per_epoch,
        {"lr": 1e-3, "weight_decay": 0.05},
        global_batch=4096,
        length="90 epochs",
        warmup="5 epochs",
        start_lr=1e-6,
        min_lr=1e-5,
    )
    total, warm = 90 * per_epoch, 5 * per_epoch
    assert schedule.total == total and 310_000 < total < 312_000  # about 310,800 steps
    i = np.arange(total, dtype=np.float64)
    rising = 1e-6 + (1e-3 - 1e-6) * i / (warm - 1)
    falling = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * (i - warm) / (total - warm)))
    expected = np.where(i < warm, rising, falling)
    found = np.array([schedule.lr(step) for step in range(total)])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert {schedule.weight_decay(step) for step in range(0, total, 1000)} == {0.05}
    assert schedule.lr(warm - 1) == schedule.lr(warm) == 1e-3


def test_the_swin_convention_with_cool_down():
    settings = {"length": "300 epochs", "cooldown": "10 epochs", "warmup": "20 epochs"}
    schedule = build(
        100,
        {"lr": 5e-4},
        global_batch=8,
        convention="swin",
        start_lr=5e-7,
        min_lr=5e-6,
        **settings,
    )
    assert schedule.total == 31_000
    for step in range(31_000):
        t = max(step - 1, 0)
        if t < 2000:
            expected = 5e-7 + t * (5e-4 - 5e-7) / 2000
        elif t < 30_000:
            expected = 5e-6 + 0.5 * (5e-4 - 5e-6) * (1 + math.cos(math.pi * t / 30_000))
        else:
            expected = 5e-6
        assert schedule.lr(step) == pytest.approx(expected, rel=1e-12)
    assert schedule.lr(2001) < 5e-4  # a little below the peak right after the warm-up


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("90 epochs", 9000),
        ("1 epoch", 100),
        ("0.1 epochs", 10),
        ("250 steps", 250),
        ("1e3 images", 125),
        ("1007 images", 125),
        ("0.5epochs", 50),
    ],
)
def test_durations(text, steps):
    assert Duration.parse(text).steps(steps_per_epoch=100, global_batch=8) == steps


@pytest.mark.parametrize("text", ["90", "epochs", "ninety epochs", "-1 steps", "1 day", "1 e", ""])
def test_what_is_no_duration(text):
    with pytest.raises(ConfigError, match="is not a duration such as"):
        Duration.parse(text)


def test_impossible_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"schedule\.warmup"):
        build(10, global_batch=8, length="2 epochs", warmup="3 epochs")
    with pytest.raises(ConfigError, match=r"schedule\.length"):
        build(10, global_batch=8, length="4 images", warmup="0 steps")
    assert interval_of("", "eval.every", 10, 8) == 0
    assert interval_of("1 images", "eval.every", 10, 8) == 1


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_possible_split_is_listed(world):
    listed = order.possible(48, world=world, multiple_of=2)
    brute = [
        (m, a) for m in range(48, 0, -1) for a in range(1, 49) if m * a * world == 48 and m % 2 == 0
    ]
    assert [(s.micro_batch, s.accumulation) for s in listed] == brute
    assert order.split(48, world=world, multiple_of=2) == listed[0]


def test_an_impossible_split_lists_the_possible_ones():
    with pytest.raises(ConfigError, match="24×1, 12×2, 8×3, 6×4"):
        order.split(48, world=2, micro_batch=5)
    with pytest.raises(ConfigError, match="the nearest that can is 50"):
        order.split(48, world=5)
    # A run that comes back on other nodes is told on how many it can go on.
    with pytest.raises(ConfigError, match=r"ranks that can: 1, 2, 3, 4, 6, 8, 12, 24$"):
        order.split(48, world=16, multiple_of=2)
    smaller = order.halve(order.split(48, world=2), multiple_of=2)
    assert smaller == order.Split(12, 2, 2)
    assert order.halve(order.Split(2, 12, 2), multiple_of=2) is None


def test_vectors_do_not_decay():
    model = timm.create_model("l2vit_mini", num_classes=5)
    groups = param_groups.param_groups(model)
    by_name = {name: group for group in groups for name in group.names}
    for name, parameter in model.named_parameters():
        assert by_name[name].decays == (parameter.ndim > 1), name
    assert by_name["stages.0.blocks.1.attn.scale"].decays  # as in the authors' runs
    assert sum(group.numel for group in groups) == sum(p.numel() for p in model.parameters())
    text = param_groups.table(groups, lr=1e-3, weight_decay=0.05)
    assert "no decay" in text and "0.05" in text


@pytest.mark.parametrize("decay", [1.0, 0.8])
@pytest.mark.parametrize(("name", "count"), [("l2vit_base", 494), ("deit_tiny_patch16_224", 152)])
def test_groups_by_the_rule_for_every_parameter(name, count, decay):
    """Vectors and exempt parameters do not decay; a layer below learns ``decay`` times less."""
    with torch.device("meta"):
        model = timm.create_model(name)
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    top, seen = max(layers.values()), 0
    for group in param_groups.param_groups(model, layer_decay=decay):
        for parameter_name, parameter in zip(group.names, group.params, strict=True):
            seen += 1
            assert model.get_parameter(parameter_name) is parameter
            assert group.decays == (parameter.ndim > 1 and parameter_name not in exempt)
            expected = decay ** (top - layers[parameter_name])
            assert group.lr_scale == pytest.approx(expected, rel=1e-12), parameter_name
    assert seen == count == len(list(model.parameters()))


def test_rates_are_set_per_group():
    weights = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))]
    groups = [
        param_groups.ParamGroup("a", ["a"], weights[:1], decays=True, lr_scale=0.5),
        param_groups.ParamGroup("b", ["b"], weights[1:], decays=False),
    ]
    optimizer = torch.optim.AdamW(param_groups.optimizer_groups(groups, 0.05))
    param_groups.set_rates(optimizer, lr=0.2, weight_decay=0.1)
    rates = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert rates == [(0.1, 0.1), (0.2, 0.0)]


def test_rates_that_fall_in_steps():
    """Detection 1x: mmcv's linear warm-up, then a tenth after epochs 8 and 11."""
    per_epoch = 7330
    schedule = build(
        per_epoch,
        {"lr": 1e-4},
        global_batch=16,
        length="12 epochs",
        warmup="500 steps",
        shape="steps",
        steps=("8 epochs", "11 epochs"),
        warmup_ratio=0.001,
    )
    golden = {0: 1e-7, 250: 5.005e-5, 500: 1e-4, 8 * per_epoch - 1: 1e-4, 8 * per_epoch: 1e-5}
    golden |= {11 * per_epoch - 1: 1e-5, 11 * per_epoch: 1e-6, 12 * per_epoch - 1: 1e-6}
    assert {i: schedule.lr(i) for i in golden} == pytest.approx(golden, rel=1e-12)
    assert schedule.total == 12 * per_epoch


def test_rates_that_fall_as_a_power():
    """Segmentation, 160,000 steps."""
    schedule = build(
        1263,
        {"lr": 6e-5},
        global_batch=16,
        length="160000 steps",
        warmup="1500 steps",
        shape="poly",
        warmup_ratio=1e-6,
        min_lr=0.0,
    )
    golden = {0: 6e-11, 750: 2.98594e-5, 1500: 5.94375e-5, 80_000: 3e-5, 159_999: 3.75e-10}
    assert {i: schedule.lr(i) for i in golden} == pytest.approx(golden, rel=1e-5)
    for i in (0, 1, 700, 1499, 1500, 99_999):
        share = 1 - (1 - i / 1500) * (1 - 1e-6) if i < 1500 else 1
        assert schedule.lr(i) == pytest.approx(6e-5 * (1 - i / 160_000) * share, rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup_ratio": 0.1},
        {"steps": ("1 epochs",)},
        {"shape": "steps"},
        {"shape": "poly", "start_lr": 1e-6},
        {"shape": "poly", "convention": "swin"},
        {"shape": "poly", "warmup_ratio": 1.5},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(ConfigError):
        check(ScheduleConfig(global_batch=8, **settings))


def test_everything_may_decay():
    model = timm.create_model("l2vit_mini", num_classes=3)
    groups = param_groups.param_groups(model, decay="all")
    assert [g.decays for g in groups] == [True]
    assert {n for g in groups for n in g.names} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize(("batch", "factor"), [(64, 0.125), (4096, 1.0), (16384, 2.0)])
def test_rates_follow_the_square_root_of_the_batch(batch, factor):
    settings = {"start_lr": 1e-6, "min_lr": 1e-5, "length": "100 steps", "warmup": "10 steps"}
    optim = {"lr": 4e-3, "lr_batch": 4096}
    scaled = build(10, optim, global_batch=batch, **settings)
    plain = build(10, {"lr": 4e-3}, global_batch=batch, **settings)
    for step in range(101):
        assert scaled.lr(step) == pytest.approx(factor * plain.lr(step), rel=1e-12)
    assert plain.lr(9) == 4e-3


def recipe(tmp_path, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "run: {dir: unused}\nmodel: {name: l2vit_mini}\nschedule: {global_batch: 4096}\n"
        "optim: {lr: 4.0e-3, lr_batch: 4096}\n"
    )
    return load(TrainConfig, path, overrides)


def test_a_rate_given_on_the_command_line_is_taken_as_it_is(tmp_path):
    assert recipe(tmp_path).optim.lr_batch == 4096
    assert recipe(tmp_path, "optim.lr=1e-3").optim.lr_batch == 0
    assert recipe(tmp_path, "optim.lr=1e-3", "optim.lr_batch=256").optim.lr_batch == 256


def test_an_unscaled_rate_on_another_batch_is_warned_of(tmp_path):
    unscaled = ("optim.lr_batch=0", "schedule.global_batch=64")
    (warning,) = startup._unscaled_rate(recipe(tmp_path, *unscaled))
    assert "optim.lr_batch=4096" in warning and "0.0005" in warning
    for quiet in (
        ("schedule.global_batch=64",),  # scaled
        (*unscaled, "optim.lr=5e-4"),  # chosen for this run
        ("optim.lr_batch=0", "schedule.global_batch=2048"),
    ):
        assert startup._unscaled_rate(recipe(tmp_path, *quiet)) == []
