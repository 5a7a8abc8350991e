"""The recipes of Tables 4 and 5: every value typed from the paper and the authors' own files."""

from pathlib import Path

import pytest

from l2vit.train import tasks
from l2vit.train.schedule import Schedule

CONFIGS = Path(__file__).parents[2] / "finetune/configs"
SIZES = ("tiny", "small", "base")
COCO_STEPS, ADE_STEPS = 7330, 1263
"""Steps of 16 pictures in an epoch: train2017's usable pictures, ADE20K's 20,210."""

# Table 4 (single scale, 1x) and Table 5
PUBLISHED = {
    "coco_retinanet_tiny_1x": "44.1, 65.8, 47.0, 30.0, 47.9, 57.9",
    "coco_retinanet_small_1x": "46.2, 68.0, 49.6, 31.7, 50.0, 61.1",
    "coco_retinanet_base_1x": "46.5, 68.7, 49.4, 31.2, 50.6, 60.7",
    "coco_mask_rcnn_tiny_1x": "45.5, 68.6, 50.1; masks 41.2, 65.1, 44.0",
    "coco_mask_rcnn_small_1x": "47.2, 70.0, 51.7; masks 42.4, 66.4, 45.2",
    "coco_mask_rcnn_base_1x": "47.5, 70.5, 51.8; masks 42.9, 67.1, 45.9",
    "coco_mask_rcnn_tiny_3x": "none published",
    "coco_mask_rcnn_small_3x": "none published",
    "coco_mask_rcnn_base_3x": "none published",
    "ade20k_upernet_tiny_160k": "mIoU 46.2",
    "ade20k_upernet_small_160k": "mIoU 48.7",
    "ade20k_upernet_base_160k": "mIoU 49.2",
}
DROP_PATH = {"1x": (0.1, 0.1, 0.2), "3x": (0.2, 0.2, 0.3), "160k": (0.3, 0.3, 0.3)}
DETECTORS = [name for name in PUBLISHED if name.startswith("coco_")]
SEGMENTORS = [name for name in PUBLISHED if name.startswith("ade20k_")]


def read(name):
    return tasks.load_config(CONFIGS / f"{name}.yaml")


def test_every_recipe_is_here():
    found = {p.stem for kind in ("coco", "ade20k") for p in CONFIGS.glob(f"{kind}_*.yaml")}
    assert found == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_all_recipes_share(name):
    """AdamW on 8 GPUs × 2 pictures in fp32; every parameter decays; no clipping, no average."""
    config = read(name)
    length, size = name.split("_")[-1], name.split("_")[-2]
    assert config.about.expected.count(PUBLISHED[name]) == 1
    assert "not measured with this code" in config.about.expected
    assert f"finetune/configs/{name}.yaml" in config.about.command
    assert f"init.source=exports/l2vit_{size}" in config.about.command
    assert config.init.source == f"exports/l2vit_{size}"
    assert (config.model.name, config.model.window_size) == (f"l2vit_{size}", 7)
    assert config.model.drop_path_rate == DROP_PATH[length][SIZES.index(size)]
    optim = config.optim
    assert (optim.betas, optim.eps, optim.decay) == ((0.9, 0.999), 1e-8, "all")
    assert (optim.clip_grad, optim.layer_decay, optim.lr_batch) == (0.0, 1.0, 0)
    assert (config.ema.decay, config.engine.precision) == (0.0, "fp32")
    assert (config.schedule.global_batch, config.engine.micro_batch) == (16, 2)
    assert config.augment.mean == (0.485, 0.456, 0.406)
    assert config.augment.std == (0.229, 0.224, 0.225)
    assert config.augment.flip == 0.5
    assert config.run.dir == f"runs/{name}"


@pytest.mark.parametrize("name", DETECTORS)
def test_detection(name):
    config, length = read(name), name[-2:]
    assert config.model.head == ("mask_rcnn" if "mask_rcnn" in name else "retinanet")
    assert config.model.fpn_channels == 256
    assert (config.model.box_width, config.model.mask_convs) == (1024, 4)
    augment = config.augment
    sides = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (augment.short_sides, augment.long_side) == (sides, 1333)
    assert (augment.crop, augment.crop_short_sides) == (0.5, (400, 500, 600))
    assert (augment.crop_sides, config.data.group) == ((384, 600), 2)
    assert (config.eval.short_side, config.eval.long_side, config.eval.every) == (800, 1333, "")
    assert (config.optim.lr, config.optim.weight_decay) == (1e-4, 0.05)
    total, falls = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}[length]
    schedule = Schedule.build(config.schedule, config.optim, steps_per_epoch=COCO_STEPS)
    assert schedule.total == total * COCO_STEPS
    for step in (0, 1, 250, 499, 500, *(e * COCO_STEPS + d for e in falls for d in (-1, 0))):
        rate = 1e-4 * 0.1 ** sum(step >= epoch * COCO_STEPS for epoch in falls)
        if step < 500:
            rate *= 1 - (1 - step / 500) * (1 - 0.001)
        assert schedule.lr(step) == pytest.approx(rate, rel=1e-9), step


@pytest.mark.parametrize("name", SEGMENTORS)
def test_segmentation(name):
    config = read(name)
    assert (config.model.head, config.model.head_norm) == ("upernet", "sync")
    assert (config.model.head_channels, config.model.auxiliary_channels) == (512, 256)
    assert (config.data.classes, config.data.zero_is_other) == (150, True)
    augment = config.augment
    assert (augment.scale, augment.short_side, augment.long_side) == ((0.5, 2.0), 512, 2048)
    assert (augment.crop, augment.largest_class, augment.colour) == (512, 0.75, True)
    evaluation = config.eval
    assert (evaluation.short_side, evaluation.long_side, evaluation.mode) == (512, 2048, "whole")
    assert evaluation.every == "16000 steps"
    assert (config.optim.lr, config.optim.weight_decay) == (6e-5, 0.01)
    schedule = Schedule.build(config.schedule, config.optim, steps_per_epoch=ADE_STEPS)
    assert schedule.total == 160_000
    for step in (0, 750, 1499, 1500, 80_000, 159_999):
        rate = 6e-5 * (1 - step / 160_000)
        if step < 1500:
            rate *= 1 - (1 - step / 1500) * (1 - 1e-6)
        assert schedule.lr(step) == pytest.approx(rate, rel=1e-9), step
