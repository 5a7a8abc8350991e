"""Every row of the recipes exists as YAML, says what it reproduces and builds.

The numbers below are typed from the paper (Table 2, 3, 9; Sec. 7) and from the authors' commands,
independently of the YAML files.
"""

import math
from pathlib import Path

import pytest
import timm
import torch

import l2vit  # noqa: F401
from l2vit.config import load
from l2vit.train.config import TrainConfig
from l2vit.train.param_groups import param_groups
from l2vit.train.schedule import Schedule

ROOT = Path(__file__).parents[1]
IN1K, IN22K = 1_281_167, 14_197_122

# file: model, M parameters, classes, images, batch, epochs, peak, lowest, start, warm-up,
#       weight decay, drop path, EMA, window, input, published top-1
ROWS = {
    "pretrain/configs/in1k_tiny.yaml": (
        *("l2vit_tiny", 28.597, 1000, IN1K, 4096, 300, 4e-3, 1e-6, 0.0, 20),
        *(0.05, 0.1, 0.9999, 7, 224, "83.1%"),
    ),
    "pretrain/configs/in1k_small.yaml": (
        *("l2vit_small", 50.199, 1000, IN1K, 4096, 300, 4e-3, 1e-6, 0.0, 20),
        *(0.05, 0.3, 0.9999, 7, 224, "84.1%"),
    ),
    "pretrain/configs/in1k_base.yaml": (
        *("l2vit_base", 88.577, 1000, IN1K, 4096, 300, 4e-3, 1e-6, 0.0, 20),
        *(0.05, 0.4, 0.9999, 7, 224, "84.4%"),
    ),
    "pretrain/configs/in22k_base.yaml": (
        *("l2vit_base", 88.577, 21841, IN22K, 4096, 90, 1e-3, 1e-5, 1e-6, 5),
        *(0.05, 0.2, 0.0, 7, 224, "86.0%"),
    ),
    "finetune/configs/in22k_in1k_base_224.yaml": (
        *("l2vit_base", 88.577, 1000, IN1K, 1024, 30, 1e-4, 1e-6, 1e-7, 5),
        *(1e-8, 0.2, 0.9999, 7, 224, "86.0%"),
    ),
    "finetune/configs/in22k_in1k_base_384.yaml": (
        *("l2vit_base", 88.577, 1000, IN1K, 1024, 30, 1e-4, 1e-6, 1e-7, 5),
        *(1e-8, 0.2, 0.9999, 12, 384, "87.0%"),
    ),
}


def read(path: str) -> TrainConfig:
    return load(TrainConfig, ROOT / path)


@pytest.mark.parametrize("path", ROWS)
def test_values_are_the_papers(path):
    config = read(path)
    row = ROWS[path]
    name, _, _, _, batch, _, peak, lowest, start, _, decay, drop_path, ema, window, size, top1 = row
    assert (config.model.name, config.schedule.global_batch) == (name, batch)
    assert (config.optim.lr, config.schedule.min_lr, config.schedule.start_lr) == (
        peak,
        lowest,
        start,
    )
    assert (config.optim.weight_decay, config.optim.clip_grad) == (decay, 0.0)
    assert (config.optim.betas, config.optim.eps) == ((0.9, 0.999), 1e-8)
    assert (config.model.drop_path_rate, config.ema.decay) == (drop_path, ema)
    assert (config.model.window_size, config.data.input_size) == (window, size)
    assert top1 in config.about.expected
    assert path in config.about.command and "launch/" in config.about.command
    assert config.about.paper


@pytest.mark.parametrize("path", ROWS)
def test_augmentation_and_evaluation(path):
    config = read(path)
    augment = config.augment
    assert augment.auto_augment == "rand-m9-mstd0.5-inc1" and augment.color_jitter == 0.0
    assert (augment.mixup, augment.cutmix, augment.mix_switch_prob) == (0.8, 1.0, 0.5)
    assert (augment.erase_prob, augment.label_smoothing) == (0.25, 0.1)
    assert augment.mean == (0.485, 0.456, 0.406) and augment.std == (0.229, 0.224, 0.225)
    crop = (1.0, "squash") if config.data.input_size == 384 else (0.875, "center")
    assert (config.eval.crop_fraction, config.eval.crop_mode) == crop


def paper_rate(step, *, warmup, total, peak, start, lowest):
    if step < warmup:
        return start + (peak - start) * step / (warmup - 1)
    phase = math.pi * (step - warmup) / (total - warmup)
    return lowest + 0.5 * (peak - lowest) * (1 + math.cos(phase))


@pytest.mark.parametrize("path", ROWS)
def test_learning_rate_of_the_whole_run(path):
    config = read(path)
    _, _, _, images, batch, epochs, peak, lowest, start, warmup, *_ = ROWS[path]
    per_epoch = images // batch
    schedule = Schedule.build(config.schedule, config.optim, steps_per_epoch=per_epoch)
    total = per_epoch * epochs
    assert schedule.total == total
    for step in {0, 1, warmup * per_epoch - 1, warmup * per_epoch, total // 2, total - 1}:
        expected = paper_rate(
            step, warmup=warmup * per_epoch, total=total, peak=peak, start=start, lowest=lowest
        )
        assert schedule.lr(step) == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert schedule.lr(warmup * per_epoch - 1) == peak


@pytest.mark.parametrize("path", ROWS)
def test_the_model_is_built(path):
    config = read(path)
    million, classes = ROWS[path][1:3]
    with torch.device("meta"):
        model = timm.create_model(
            config.model.name,
            num_classes=classes,
            window_size=config.model.window_size,
            drop_path_rate=config.model.drop_path_rate,
            **config.model.args,
        )
    count = sum(p.numel() for p in model.parameters())
    head = 1024 * (classes - 1000) + (classes - 1000)
    assert count - head == pytest.approx(million * 1e6, abs=500)
    decayed = {name for g in param_groups(model) if g.decays for name in g.names}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1}


def test_every_shipped_recipe_is_in_the_table_or_for_other_data():
    shipped = {
        str(path.relative_to(ROOT))
        for folder in ("pretrain", "finetune")
        for path in (ROOT / folder / "configs").glob("*.yaml")
        if not path.name.startswith(("quickstart_", "my_folder", "coco_", "ade20k_"))
    }
    families = {p for p in shipped if Path(p).name.startswith(("flatten_", "inline_"))}
    assert shipped - families == set(ROWS)


def test_recipes_for_ones_own_folder():
    """The paper's rate for 4096 images, scaled by the square root of the batch, at any batch."""
    config = read("pretrain/configs/my_folder.yaml")
    for batch in (config.schedule.global_batch, 64, 256, 4096):
        rate = config.optim.lr * config.optim.scale(batch)
        assert rate == pytest.approx(4e-3 * math.sqrt(batch / 4096))
    assert config.ema.warmup and config.data.val
    tuned = read("finetune/configs/my_folder.yaml")
    assert tuned.optim.lr * tuned.optim.scale(64) < config.optim.lr and tuned.ema.warmup
    assert tuned.model.name == config.model.name and tuned.init.source == ""


def test_22k_budget():
    """Spec: about 310,800 steps; 14,197,122 // 4096 = 3466 a step-dropping epoch."""
    assert abs(90 * (IN22K // 4096) - 310_800) < 0.005 * 310_800


def test_small_files_inherit():
    text = (ROOT / "finetune/configs/in22k_in1k_base_384.yaml").read_text()
    assert "base: in22k_in1k_base_224.yaml" in text
    assert len(text.splitlines()) < 30
