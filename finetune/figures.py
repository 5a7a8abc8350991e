"""Draw what a model looks at: what ``finetune look`` does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import maps, pictures, sample_images, verification
from finetune.accuracy import default_device
from finetune.maps import AttentionMap
from finetune.sample_images import Sample
from l2vit import files
from l2vit.errors import ConfigError
from l2vit.train.weights import Preprocessing, PretrainedWeights, no_grad_logits, read_pretrained

_SHOWN_TOKENS = 128
_LAYERS_A_ROW = 6


def run(options: argparse.Namespace) -> None:
    """Draw the pictures that the options of ``finetune.look`` ask for."""
    if options.count < 1 or options.max_tokens < 1:
        raise ConfigError("--count and --max-tokens must be at least 1")
    source = read_pretrained(options.model, weights=options.weights, model=options.name)
    samples = (
        sample_images.samples_at(options.images, options.count)
        if options.images
        else sample_images.embedded()[:: max(1, 10 // options.count)][: options.count]
    )
    device = default_device()
    model = source.build().to(device)
    images = verification.inputs_of(source, samples).to(device)
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = _wanted(source, options.wanted, len(images)).to(device) if options.wanted else None
    cam = maps.grad_cam(model, images, options.layer, wanted)
    found = maps.attention_maps(model, images[:1], options.max_tokens)
    shares = maps.clamped_shares(model, images)
    shown = [_displayed(image, source.preprocessing) for image in images.cpu()]
    titles = _titles(source, model, images, samples)
    figures = {
        "grad_cam": _cam_figure(shown, cam.cpu(), titles),
        "attention": _attention_figure(shown[0], found),
        "clamped": _clamped_figure(shares, len(images)),
    }
    for name, figure in figures.items():
        if figure is not None:
            pictures.save_figure(figure, options.out / f"{name}.png")
    files.write_json(options.out / "clamped.json", shares)
    _to_tensorboard(options.out, figures, shares)
    for name, share in shares.items():
        print(f"{name:<28} {100 * share:6.2f}% of denominators clamped")
    print(f"pictures and TensorBoard files in {options.out}")


def _wanted(source: PretrainedWeights, name: str, count: int) -> Tensor:
    for names in (source.classes, source.class_names):
        if name in names:
            return torch.full((count,), names.index(name))
    if name.isdecimal() and int(name) < source.num_classes:
        return torch.full((count,), int(name))
    raise ConfigError(f"--class {name!r} is no class of {source.path}")


def _displayed(image: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """(H, W, 3) in [0, 1]: the normalised (3, H, W) picture as a person sees it."""
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def _titles(
    source: PretrainedWeights, model: nn.Module, images: Tensor, samples: Sequence[Sample]
) -> list[str]:
    chances = no_grad_logits(model, images).softmax(1).max(1)
    names = source.class_names or source.classes
    titles = []
    for chance, row, sample in zip(*chances, samples, strict=True):
        answer = names[int(row)] if names else f"class {int(row)}"
        true = dict(zip(source.classes, names, strict=True)).get(sample.label, sample.label)
        suffix = f"\ntrue: {true.split(',')[0]}" if true else ""
        titles.append(f"{answer.split(',')[0]} {100 * float(chance):.0f}%{suffix}")
    return titles


def _cam_figure(shown: list[np.ndarray], cam: Tensor, titles: list[str]) -> Any:
    """Pictures above their Grad-CAM maps, as in the paper's Fig. 1."""
    figure = pictures.new_figure(2.2 * max(len(shown), 2), 4.9)
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, (picture, heat, title) in enumerate(zip(shown, cam, titles, strict=True)):
        axes[0, column].imshow(picture)
        axes[0, column].set_title(title, fontsize=9)
        axes[1, column].imshow(picture)
        drawn = axes[1, column].imshow(heat.numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
    for place in axes.ravel():
        place.set_axis_off()
    figure.colorbar(drawn, ax=axes[1, :], shrink=0.9, label="share of the map's maximum")
    figure.suptitle("Grad-CAM of the answer (bright: speaks for it)", fontsize=10)
    return figure


def _attention_figure(picture: np.ndarray, found: list[AttentionMap]) -> Any:
    """For each layer the token-to-token map (Fig. 2) and where the middle token looks."""
    if not found:
        return None
    columns = min(_LAYERS_A_ROW, len(found) + 1)
    rows = -(-(len(found) + 1) // columns)
    figure = pictures.new_figure(2.3 * columns, 4.9 * rows)
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for place in axes.ravel():
        place.set_axis_off()
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title("input", fontsize=8)
    height, width = picture.shape[:2]
    for number, layer in enumerate(found, start=1):
        row, column = 2 * (number // columns), number % columns
        upper, lower = axes[row, column], axes[row + 1, column]
        tokens = len(layer.weights)
        drawn = upper.imshow(
            _spread(_shrunk(layer.weights)), cmap="viridis", interpolation="nearest", vmin=0, vmax=1
        )
        upper.set_title(f"{layer.layer}\n{layer.kind}, {tokens} tokens", fontsize=7)
        middle = (layer.grid[0] // 2, layer.grid[1] // 2)
        lower.imshow(picture, extent=(0, width, height, 0))
        lower.imshow(
            _spread(layer.of_token(*middle).cpu()),
            cmap="inferno",
            alpha=0.7,
            extent=(0, width, height, 0),
            interpolation="nearest",
            vmin=0,
            vmax=1,
        )
        y, x = ((m + 0.5) / g for m, g in zip(middle, layer.grid, strict=True))
        lower.plot(x * width, y * height, "c+", markersize=8)
        lower.set_title("where the token at + looks", fontsize=7)
    scale = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.5, aspect=50)
    scale.set_label("weight over the 99th percentile of its map", fontsize=8)
    figure.suptitle(
        "Attention: token to token (row looks at column), mean of the heads", fontsize=10
    )
    return figure


def _shrunk(weights: Tensor) -> Tensor:
    """Mean over blocks, so that a map of thousands of tokens fits the picture."""
    if len(weights) <= _SHOWN_TOKENS:
        return weights.cpu()
    return F.adaptive_avg_pool2d(weights[None], _SHOWN_TOKENS)[0].cpu()


def _spread(values: Tensor) -> np.ndarray:
    """Scaled so that the 99th percentile is white: single peaks would hide the rest."""
    array = values.float().numpy()
    top = float(np.quantile(array, 0.99)) or float(array.max()) or 1.0
    return np.clip(array / top, 0, 1)


def _clamped_figure(shares: dict[str, float], images: int) -> Any:
    if not shares:
        return None
    figure = pictures.new_figure(7, 1.2 + 0.3 * len(shares))
    axes = figure.subplots()
    names = list(shares)
    axes.barh(range(len(names)), [100 * shares[name] for name in names])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel=f"% of denominators below the bound ({images} images)")
    return figure


def _to_tensorboard(out: Path, figures: dict[str, Any], shares: dict[str, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out)) as writer:
        for name, figure in figures.items():
            if figure is not None:
                pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
                writer.add_image(f"look/{name}", pixels, dataformats="HWC")
        for name, share in shares.items():
            writer.add_scalar(f"look/clamped_share/{name}", share)
