"""``python -m pretrain preview --config F --out page.html``: what the model really sees.

The first batch of a run as each backend makes it, before and after mixing, with its labels and
its targets, in one HTML file.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from l2vit import cli, config, files
from l2vit.data.batch import Batch
from l2vit.data.config import AugmentConfig, DataConfig
from l2vit.data.contact_sheet import to_bytes
from l2vit.data.loader import train_loader
from l2vit.data.manifest import Manifest
from l2vit.data.mixup import Mixer
from l2vit.data.order import Split, mix_group
from l2vit.errors import ConfigError
from l2vit.train.config import TrainConfig

BACKENDS: tuple[Literal["pil", "dali"], ...] = ("pil", "dali")
_TITLES = {"pil": "PIL", "dali": "DALI", "mixed": "mixed"}
_STYLE = """body{font:14px sans-serif;margin:2em;max-width:80em}
table{border-collapse:collapse}td,th{padding:6px;text-align:left;vertical-align:top}
img{display:block;image-rendering:pixelated;min-width:96px}"""


def first_batch(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    manifest: Manifest,
    seed: int,
    images: int,
    images_seen: int,
    global_batch: int,
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
        images_seen=images_seen,
    )
    try:
        return next(loader)
    finally:
        loader.close()


def page(settings: TrainConfig, *, images: int, images_seen: int) -> str:
    """The preview of ``settings`` as HTML.

    Raises:
        UserError: shards or batch sizes do not fit.
    """
    manifest = Manifest.load(Path(settings.data.train))
    batches = {}
    backends = BACKENDS[:1] if settings.data.stream else BACKENDS  # DALI reads no streams
    for backend in backends:
        data = dataclasses.replace(settings.data, backend=backend, threads=int(backend == "dali"))
        batches[backend] = first_batch(
            data,
            settings.augment,
            manifest=manifest,
            seed=settings.run.seed,
            images=images,
            images_seen=images_seen,
            global_batch=settings.schedule.global_batch,
        )
    classes = len(manifest.classes)
    mixer = Mixer(settings.augment, num_classes=classes, seed=settings.run.seed)
    mixed, targets = mixer(batches["pil"])
    mean, std = settings.augment.mean, settings.augment.std
    pictures: dict[str, np.ndarray] = {
        name: to_bytes(batch.images, mean, std) for name, batch in batches.items()
    }
    pictures["mixed"] = to_bytes(mixed, mean, std)
    compared = "DALI reads no streams."
    if "dali" in pictures:
        apart = np.abs(pictures["pil"].astype(int) - pictures["dali"]).mean()
        compared = f"Mean difference of the backends: {apart:.3f} of 255."
    rows = [
        _row(manifest, batches["pil"], i, {k: v[i] for k, v in pictures.items()}, targets[i])
        for i in range(images)
    ]
    head = (
        f"<h1>{html.escape(manifest.dataset)} {html.escape(manifest.split)}</h1>"
        f"<p>Step at {images_seen:,} images seen, seed {settings.run.seed}, epoch"
        f" {batches['pil'].epoch}. {compared}</p>"
    )
    columns = "".join(f"<th>{_TITLES[name]}</th>" for name in pictures)
    names = f"<tr><th>sample</th>{columns}<th>target</th></tr>"
    title = "<!doctype html><meta charset=utf-8><title>What the model sees</title>"
    return f"{title}<style>{_STYLE}</style>{head}<table>{names}{''.join(rows)}</table>\n"


def _row(
    manifest: Manifest, batch: Batch, i: int, pictures: dict[str, np.ndarray], target: torch.Tensor
) -> str:
    label = _class(manifest, int(batch.labels[i]))
    shares, at = target.topk(min(2, len(target)))
    parts = [
        f"{_class(manifest, c)}: {share:.3f}"
        for share, c in zip(shares.tolist(), at.tolist(), strict=True)
    ]
    cells = "".join(f"<td>{_img(pictures[name])}</td>" for name in pictures)
    sample = f"{label}<br>sample {batch.sample_ids[i]}<br>position {batch.positions[i]}"
    return f"<tr><td>{sample}</td>{cells}<td>{'<br>'.join(parts)}</td></tr>"


def _class(manifest: Manifest, label: int) -> str:
    name = manifest.class_names[label] if manifest.class_names else ""
    wnid = manifest.classes[label]
    return html.escape(wnid if name in ("", wnid) else f"{wnid} {name}")


def _img(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'


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


@cli.program("pretrain preview")
def main(argv: Sequence[str]) -> None:
    """Write the page the arguments ask for."""
    parser = cli.parser("python -m pretrain preview", __doc__, keys_of=TrainConfig)
    cli.add_config(parser)
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--images", type=int, default=16, help="pictures to show")
    parser.add_argument("--images-seen", type=int, default=0, help="which step of the run")
    options = cli.parse(parser, argv)
    settings = config.load(TrainConfig, options.config, options.overrides)
    images = shown(settings, options.images)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(options.out, page(settings, images=images, images_seen=options.images_seen))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())
