"""The page of ``python -m pretrain preview``: what the model really sees.

The first pictures of a step in one HTML file: the source with the crop, the picture as each backend
makes it and as it is mixed, the operations drawn for it, its partner, and the mixture's labels.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from l2vit import pages
from l2vit.data.augment import NO_OP, OPS, AugmentParams, AugmentSampler
from l2vit.data.batch import Batch
from l2vit.data.config import AugmentConfig, DataConfig
from l2vit.data.contact_sheet import to_bytes
from l2vit.data.loader import open_reader, train_loader
from l2vit.data.manifest import Manifest
from l2vit.data.mixup import Mixer, MixParams
from l2vit.data.order import Split, mix_group
from l2vit.data.pil import decode
from l2vit.errors import ConfigError
from l2vit.train.config import TrainConfig

BACKENDS: tuple[Literal["pil", "dali"], ...] = ("pil", "dali")
_TITLES = {"pil": "PIL", "dali": "DALI", "mixed": "mixed"}
_STYLE = """.places{display:grid;gap:14px;margin-top:18px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr))}
.places section{margin:0;min-width:0;padding:12px 14px}
section:target{outline:3px solid var(--main)}h2{margin:0}
.row{display:flex;gap:8px}.row figure{flex:1 1 0}
.row img,.row svg{display:block;width:100%;aspect-ratio:1;border-radius:4px}
.row img{image-rendering:pixelated}.row rect{fill:none;stroke:#ff3d7f;stroke-width:3px;
vector-effect:non-scaling-stroke}.row figcaption{font-size:12px;color:var(--dim)}
.places table{margin-top:8px}.places td,.places th{border:0;padding:1px 12px 1px 0}"""
_SOURCE_SIDE = 320
_WITHOUT = ("AutoContrast", "Equalize", "Invert")
_ARGUMENTS = {
    "Rotate": "{:.1f}°",
    "Posterize": "to {:.0f} bits",
    "Solarize": "above {:.0f}",
    "SolarizeAdd": "{:+.0f}",
    "TranslateXRel": "by {:.1%}",
    "TranslateYRel": "by {:.1%}",
}
"""How the argument of an operation is written; factors and shears are plain numbers."""


def first_batch(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    manifest: Manifest,
    seed: int,
    images: int,
    images_seen: int,
    global_batch: int,
    draws: int = 0,
) -> Batch:
    """The first ``images`` places of a step, on the CPU."""
    loader = train_loader(
        data,
        augment,
        manifest=manifest,
        split=Split(images, global_batch // images, 1),
        rank=0,
        seed=seed,
        device=torch.device("cpu"),
        draws=draws,
        images_seen=images_seen,
    )
    try:
        return next(loader)
    finally:
        loader.close()


@dataclass(frozen=True)
class Preview:
    """The same batch at every stage, and what was drawn for it."""

    manifest: Manifest
    batch: Batch
    """As PIL makes it."""
    stages: dict[str, np.ndarray]
    """By name of the stage: (n, S, S, 3) uint8."""
    sources: list[np.ndarray | None]
    """The pictures before anything was done to them; None where there is no local shard."""
    drawn: AugmentParams
    boxes: np.ndarray
    """(n, 4) int64 crops: top, left, height, width in the source picture."""
    mix: MixParams | None
    targets: torch.Tensor
    """(n, classes), of the mixture."""


def make_preview(settings: TrainConfig, *, images: int, images_seen: int) -> Preview:
    """Make the first ``images`` pictures of a step.

    Raises:
        UserError: shards or batch sizes do not fit.
    """
    manifest, augment = Manifest.load(settings.data.train), settings.augment
    batches = {}
    backends = BACKENDS[:1] if settings.data.stream else BACKENDS  # DALI reads no streams
    for backend in backends:
        data = dataclasses.replace(settings.data, backend=backend, threads=int(backend == "dali"))
        batches[backend] = first_batch(
            data,
            augment,
            manifest=manifest,
            seed=settings.run.seed,
            images=images,
            images_seen=images_seen,
            global_batch=settings.schedule.global_batch,
            draws=settings.run.draws,
        )
    batch = batches["pil"]
    stages: dict[str, np.ndarray] = {
        name: to_bytes(made.images, augment.mean, augment.std) for name, made in batches.items()
    }
    mixer = Mixer(augment, num_classes=len(manifest.classes), seed=settings.run.seed)
    mixed, targets = mixer(batch)
    mix = None
    if augment.mixup or augment.cutmix:
        stages["mixed"] = to_bytes(mixed, augment.mean, augment.std)
        mix = mixer.sample(batch.epoch, batch.positions, *mixed.shape[-2:])
    sampler = AugmentSampler(augment, input_size=settings.data.input_size, seed=settings.run.seed)
    drawn = sampler.sample(batch.epoch, batch.sample_ids)
    sources = _sources(settings, manifest, batch)
    sizes = np.array([(1, 1) if s is None else s.shape[:2] for s in sources])
    boxes = sampler.boxes(drawn, sizes)
    return Preview(manifest, batch, stages, sources, drawn, boxes, mix, targets)


def _sources(settings: TrainConfig, manifest: Manifest, batch: Batch) -> list[np.ndarray | None]:
    if settings.data.stream:
        return [None] * len(batch)
    reader = open_reader(settings.data, settings.data.train, manifest)
    return [decode(reader.read(sample).image) for sample in batch.sample_ids.tolist()]


def page(settings: TrainConfig, *, images: int, images_seen: int) -> str:
    """The preview of ``settings`` as HTML.

    Raises:
        UserError: shards or batch sizes do not fit.
    """
    preview = make_preview(settings, images=images, images_seen=images_seen)
    compared = "DALI reads no streams."
    if "dali" in preview.stages:
        apart = np.abs(preview.stages["pil"].astype(int) - preview.stages["dali"]).mean()
        compared = f"Mean difference of the backends: {apart:.3f} of 255."
    cards = "".join(_card(preview, i) for i in range(images))
    body = (
        f"<h1>What the model sees of {html.escape(settings.data.train)}</h1>"
        f"<p>Step at {images_seen:,} images seen, seed {settings.run.seed}, epoch"
        f' {preview.batch.epoch}. {compared}</p><div class="places">{cards}</div>'
    )
    return pages.document("What the model sees", body, style=_STYLE)


def _card(preview: Preview, i: int) -> str:
    """One picture: its source with the crop, its stages, and what was drawn for it."""
    source = preview.sources[i]
    figures = [] if source is None else [_source_figure(source, preview.boxes[i])]
    figures += [
        f"<figure>{_img(pixels[i])}<figcaption>{_TITLES[name]}</figcaption></figure>"
        for name, pixels in preview.stages.items()
    ]
    batch = preview.batch
    label = _class(preview.manifest, int(batch.labels[i]))
    lines = [*_drawn_lines(preview, i), *_mix_lines(preview, i)]
    rows = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in lines)
    return (
        f'<section id="place{i}"><h2>{i}. {label}</h2>'
        f'<p class="quiet">sample {batch.sample_ids[i]}, position {batch.positions[i]}</p>'
        f'<div class="row">{"".join(figures)}</div><table>{rows}</table></section>'
    )


def _drawn_lines(preview: Preview, i: int) -> list[tuple[str, str]]:
    drawn, lines = preview.drawn, []
    source = preview.sources[i]
    if source is not None:
        top, left, height, width = preview.boxes[i].tolist()
        of = f"{source.shape[1]}×{source.shape[0]}"
        lines.append(("crop", f"{width}×{height} at ({left}, {top}) of {of}"))
    done = ["flipped"] if drawn.flip[i] else []
    done += [
        _operation(OPS[number], argument)
        for number, argument in zip(drawn.ops[i].tolist(), drawn.arguments[i].tolist(), strict=True)
        if number != NO_OP
    ]
    lines.append(("operations", ", then ".join(done) or "none"))
    top, left, height, width = drawn.erase[i].tolist()
    if height:
        lines.append(("erased", f"{width}×{height} at ({left}, {top})"))
    return lines


def _operation(name: str, argument: float) -> str:
    return name if name in _WITHOUT else f"{name} {_ARGUMENTS.get(name, '{:.2f}').format(argument)}"


def _mix_lines(preview: Preview, i: int) -> list[tuple[str, str]]:
    lines, mix = [], preview.mix
    if mix is not None:
        partner, own = int(mix.partners[i]), float(mix.weights[i])
        other = _class(preview.manifest, int(preview.batch.labels[partner]))
        how = "mixup"
        if mix.cut[i]:
            top, bottom, left, right = mix.boxes[i].tolist()
            how = f"cutmix, {right - left}×{bottom - top} at ({left}, {top})"
        link = f'<a href="#place{partner}">{partner}. {other}</a>'
        lines.append(("partner", f"{link}: {1 - own:.1%} of the mixture ({how})"))
    shares, at = preview.targets[i].topk(min(2, preview.targets.shape[1]))
    labels = [
        f"{_class(preview.manifest, c)} {share:.3f}"
        for share, c in zip(shares.tolist(), at.tolist(), strict=True)
    ]
    return [*lines, ("target", "<br>".join(labels))]


def _class(manifest: Manifest, label: int) -> str:
    name = manifest.class_names[label] if manifest.class_names else ""
    wnid = manifest.classes[label]
    return html.escape(wnid if name in ("", wnid) else f"{name.split(',')[0]} ({wnid})")


def _img(pixels: np.ndarray) -> str:
    return f'<img src="data:image/png;base64,{_encoded(Image.fromarray(pixels), "PNG")}">'


def _source_figure(source: np.ndarray, box: np.ndarray) -> str:
    """The whole picture, with the crop drawn around what was taken."""
    small = Image.fromarray(source)
    small.thumbnail((_SOURCE_SIDE, _SOURCE_SIDE))
    height, width = source.shape[:2]
    top, left, tall, wide = box.tolist()
    return (
        f'<figure class="source"><svg viewBox="0 0 {width} {height}">'
        f'<image width="{width}" height="{height}" preserveAspectRatio="none"'
        f' href="data:image/jpeg;base64,{_encoded(small, "JPEG")}"/>'
        f'<rect x="{left}" y="{top}" width="{wide}" height="{tall}"/></svg>'
        "<figcaption>source and crop</figcaption></figure>"
    )


def _encoded(image: Image.Image, form: str) -> str:
    stream = io.BytesIO()
    image.save(stream, form)
    return base64.b64encode(stream.getvalue()).decode()


def shown(settings: TrainConfig, wanted: int) -> int:
    """The most pictures up to ``wanted`` that divide a step into whole mixing groups.

    Raises:
        ConfigError: none do.
    """
    whole, group = settings.schedule.global_batch, mix_group(settings.augment)
    fit = [n for n in range(group, min(max(wanted, group), whole) + 1, group) if whole % n == 0]
    if wanted < 1 or not fit:
        raise ConfigError(f"--images: cannot show {wanted} of a step of {whole} images")
    return fit[-1]
