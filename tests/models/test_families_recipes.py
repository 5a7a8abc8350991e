"""Recipes of FLatten and InLine: numbers typed from the authors' configurations, files built."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import l2vit  # noqa: F401
from l2vit.config import load
from l2vit.train.config import InitConfig, TrainConfig
from l2vit.train.param_groups import param_groups
from l2vit.train.schedule import Schedule
from l2vit.train.transfer import load_initial

ROOT = Path(__file__).parents[2]
IMAGES = 1_281_167
FLATTEN_EMA, INLINE_EMA = (lambda batch: 0.99984), (lambda batch: 0.9996 ** (batch / 4096))
NO_EMA = lambda batch: 0.0  # noqa: E731

# epochs, cool-down, warm-up, peak, start, lowest (per 512 images), weight decay, clip norm
SWIN = (300, 0, 20, 5e-4, 5e-7, 5e-6, 0.05, 5.0)
SWIN_384 = (30, 0, 5, 2e-5, 2e-8, 2e-7, 1e-8, 5.0)
PVT = (300, 10, 5, 5e-4, 1e-6, 1e-5, 0.05, 0.0)
PVT_CLIPPED = (*PVT[:-1], 1.0)
CSWIN = (300, 10, 20, 5e-4, 1e-6, 1e-5, 0.05, 0.0)
CSWIN_B = (*CSWIN[:6], 0.1, 0.0)
CSWIN_384 = (20, 10, 0, 5e-6, 5e-6, 5e-7, 1e-8, 0.0)

# model: shared row, drop path, total batch, EMA, input
ROWS = {
    "flatten_swin_tiny": (SWIN, 0.2, 1024, NO_EMA, 224),
    "flatten_swin_small": (SWIN, 0.3, 1024, NO_EMA, 224),
    "flatten_swin_base": (SWIN, 0.5, 512, NO_EMA, 224),
    "flatten_swin_base_384": (SWIN_384, 0.5, 256, NO_EMA, 384),
    "inline_swin_tiny": (SWIN, 0.2, 1024, NO_EMA, 224),
    "inline_swin_small": (SWIN, 0.3, 1024, NO_EMA, 224),
    "inline_swin_base": (SWIN, 0.5, 512, NO_EMA, 224),
    "inline_swin_base_384": (SWIN_384, 0.5, 256, NO_EMA, 384),
    "flatten_pvt_tiny": (PVT, 0.1, 1024, NO_EMA, 224),
    "flatten_pvt_small": (PVT, 0.1, 512, NO_EMA, 224),
    "flatten_pvt_medium": (PVT_CLIPPED, 0.3, 512, NO_EMA, 224),
    "flatten_pvt_base": (PVT_CLIPPED, 0.3, 256, NO_EMA, 224),
    "inline_pvt_tiny": (PVT, 0.1, 1024, NO_EMA, 224),
    "inline_pvt_small": (PVT, 0.1, 1024, NO_EMA, 224),
    "inline_pvt_medium": (PVT_CLIPPED, 0.3, 1024, NO_EMA, 224),
    "inline_pvt_large": (PVT_CLIPPED, 0.3, 512, NO_EMA, 224),
    "flatten_pvt_v2_b0": (PVT, 0.1, 1024, NO_EMA, 224),
    "flatten_pvt_v2_b1": (PVT, 0.1, 1024, NO_EMA, 224),
    "flatten_pvt_v2_b2": (PVT, 0.1, 1024, NO_EMA, 224),
    "flatten_pvt_v2_b3": (PVT_CLIPPED, 0.3, 1024, NO_EMA, 224),
    "flatten_pvt_v2_b4": (PVT_CLIPPED, 0.3, 512, NO_EMA, 224),
    "flatten_cswin_tiny": (CSWIN, 0.2, 2048, FLATTEN_EMA, 224),
    "flatten_cswin_small": (CSWIN, 0.4, 1024, FLATTEN_EMA, 224),
    "flatten_cswin_base": (CSWIN_B, 0.5, 512, lambda batch: 0.99982, 224),
    "flatten_cswin_base_384": (CSWIN_384, 0.7, 256, lambda batch: 0.99982, 384),
    "inline_cswin_tiny": (CSWIN, 0.2, 1024, INLINE_EMA, 224),
    "inline_cswin_small": (CSWIN, 0.4, 1024, INLINE_EMA, 224),
    "inline_cswin_base": (CSWIN_B, 0.5, 512, INLINE_EMA, 224),
    "inline_cswin_base_384": (CSWIN_384, 0.7, 256, INLINE_EMA, 384),
    "inline_deit_tiny": (SWIN, 0.1, 4096, NO_EMA, 224),
    "inline_deit_small": (SWIN, 0.1, 1024, NO_EMA, 288),
    "inline_deit_base": (SWIN, 0.1, 512, NO_EMA, 448),
}


def path(name):
    folder = "finetune" if name.endswith("384") else "pretrain"
    return f"{folder}/configs/{name}.yaml"


def rate(step, *, epoch, epochs, warm, peak, start, lowest):
    """The first step uses t = 0, step i > 0 uses t = i − 1."""
    t, total, warm = max(step - 1, 0), epochs * epoch, warm * epoch
    if t < warm:
        return start + t * (peak - start) / warm
    if t < total:
        return lowest + 0.5 * (peak - lowest) * (1 + math.cos(math.pi * t / total))
    return lowest


@pytest.mark.parametrize("name", ROWS)
def test_recipe(name):
    shared, drop_path, batch, ema, size = ROWS[name]
    epochs, cool, warm, peak, start, lowest, decay, clip = shared
    config = load(TrainConfig, ROOT / path(name))
    assert config.model.name == name and config.run.dir == f"runs/{name}"
    assert path(name) in config.about.command and config.about.paper and config.about.expected
    assert config.schedule.global_batch == batch and config.model.drop_path_rate == drop_path
    assert (config.optim.weight_decay, config.optim.clip_grad) == (decay, clip)
    assert (config.optim.betas, config.optim.eps) == ((0.9, 0.999), 1e-8)
    assert config.ema.decay == pytest.approx(ema(batch), rel=1e-9)
    assert config.engine.precision == ("fp32" if name.startswith("flatten") else "fp16")
    factor, epoch = batch / 512, IMAGES // batch
    schedule = Schedule.build(config.schedule, config.optim, steps_per_epoch=epoch)
    assert schedule.total == (epochs + cool) * epoch
    values = {"peak": peak * factor, "start": start * factor, "lowest": lowest * factor}
    for step in {
        0,
        1,
        warm * epoch,
        warm * epoch + 1,
        9 * epoch,
        epochs * epoch,
        schedule.total - 1,
    }:
        expected = rate(step, epoch=epoch, epochs=epochs, warm=warm, **values)
        assert schedule.lr(step) == pytest.approx(expected, rel=1e-12)
    # Evaluation: resize to the square int(256/224 · size); Swin B-384 straight to 384.
    straight = name.endswith("_swin_base_384")
    resized = {224: 256, 288: 329, 384: 438, 448: 512}[size]
    crop = 1.0 if straight else config.eval.crop_fraction
    assert config.eval.crop_mode == "squash" and config.eval.crop_fraction == crop
    assert int(size / crop) == (size if straight else resized)


@pytest.mark.parametrize("name", ROWS)
def test_augmentation_and_model(name):
    config, size = load(TrainConfig, ROOT / path(name)), ROWS[name][-1]
    augment = config.augment
    assert augment.auto_augment == "rand-m9-mstd0.5-inc1" and augment.interpolation == "bicubic"
    assert (augment.mixup, augment.cutmix, augment.mix_switch_prob) == (0.8, 1.0, 0.5)
    assert (augment.erase_prob, augment.label_smoothing, augment.hflip) == (0.25, 0.1, 0.5)
    assert config.data.input_size == size
    with torch.device("meta"):
        model = timm.create_model(
            name,
            img_size=size,
            window_size=config.model.window_size,
            drop_path_rate=config.model.drop_path_rate,
        )
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, size, size) and cfg["crop_mode"] == "squash"
    assert cfg["crop_pct"] == config.eval.crop_fraction
    kept = {n for g in param_groups(model) if not g.decays for n in g.names}
    deit = {"pos_embed", "cls_token"} if "deit" in name else set()
    assert kept == deit | {
        n
        for n, p in model.named_parameters()
        if p.ndim <= 1 or n.endswith("relative_position_bias_table")
    }


@pytest.mark.parametrize("name", [name for name in ROWS if name.endswith("384")])
def test_enlarging_starts_from_the_run_at_224(name, tmp_path):
    """The 384 recipes take the weights of the 224 model of the same size, tables resized."""
    config = load(TrainConfig, ROOT / path(name))
    small = name.removesuffix("_384")
    assert config.init.source == f"runs/{small}"
    small_sizes = {"embed_dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    types = {"types": "LLSS"}  # two heads at least where CSwin halves them
    torch.manual_seed(0)
    first = timm.create_model(small, img_size=64, window_size=2, **small_sizes, **types)
    exported = tmp_path / small
    exported.mkdir()
    save_file(first.state_dict(), exported / "model.safetensors")
    arguments = {"img_size": 64, "window_size": 2, **small_sizes, **types}
    described = {
        "architecture": small,
        "pretrained_cfg": dict(first.pretrained_cfg),
        "model_args": arguments,
    }
    (exported / "config.json").write_text(json.dumps(described))
    second = timm.create_model(name, img_size=128, window_size=4, **small_sizes, **types)
    classes = [str(i) for i in range(1000)]
    init = InitConfig(source=str(exported), head="fresh")
    report = load_initial(second, init, classes=classes, class_names=classes)
    resized = {t.name for t in report.tensors if t.fate == "resized"}
    tables = {n for n, _ in second.named_parameters() if n.endswith(("encoding", "bias_table"))}
    assert resized == tables and (tables or "inline_cswin" in name)
    kept = first.state_dict()["stages.2.blocks.0.attn.qkv.weight"]
    assert torch.equal(second.state_dict()["stages.2.blocks.0.attn.qkv.weight"], kept)


def test_every_shipped_recipe_is_in_the_table():
    shipped = {
        str(p.relative_to(ROOT))
        for folder in ("pretrain", "finetune")
        for p in (ROOT / folder / "configs").glob("*.yaml")
        if p.name.startswith(("flatten_", "inline_"))
    }
    assert shipped == {path(name) for name in ROWS}
    registered = set(timm.list_models("flatten_*")) | set(timm.list_models("inline_*"))
    assert {n for n in registered if not n.endswith("mini")} == set(ROWS)
