"""Real small pictures as shards and folders, and a model trained enough to be told apart."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

import l2vit  # noqa: F401
from l2vit import config as configuration
from l2vit.data.manifest import Manifest, Shard
from l2vit.train import checkpoint
from l2vit.train.checkpoint import CheckpointMeta, TensorSlice
from l2vit.train.config import TrainConfig

WNIDS = tuple(f"n9000000{digit}" for digit in range(10))


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


SIZE, WINDOW = 48, 6


def digit_jpegs(count):
    """(JPEG bytes, digit) of scanned digits, 40 pixels a side, colours inverted for some."""
    found = load_digits()
    out = []
    for pixels, digit in zip(found.images[:count], found.target[:count], strict=True):
        grey = (pixels / 16 * 255).astype(np.uint8)
        picture = Image.fromarray(grey).resize((44, 40), Image.Resampling.BILINEAR).convert("RGB")
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=95)
        out.append((stream.getvalue(), int(digit)))
    return out


def write_shards(directory, samples, classes, names=(), per_shard=40, key="s{:05d}"):
    """Shards, indexes, manifest and _info.json by plain tarfile, independent of data_prep."""
    directory.mkdir(parents=True)
    shards, counts, number = [], [0] * len(classes), 0
    for first in range(0, len(samples), per_shard):
        part = samples[first : first + per_shard]
        path = directory / f"shard-{first // per_shard:06d}.tar"
        lines = []
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for data, label in part:
                fields = []
                for suffix, content in (("jpg", data), ("cls", b"%05d" % label)):
                    info = tarfile.TarInfo(f"{key.format(number)}.{suffix}")
                    info.size = len(content)
                    offset = tar.offset + 512
                    tar.addfile(info, io.BytesIO(content))
                    fields += [suffix, str(offset), str(len(content)), info.name]
                lines.append(" ".join(fields))
                counts[label] += 1
                number += 1
        index = f"v1.2 {len(part)}\n" + "".join(line + "\n" for line in lines)
        path.with_suffix(".idx").write_text(index)
        data = path.read_bytes()
        shards.append(
            Shard(
                path.name,
                len(part),
                len(data),
                hashlib.sha256(data).hexdigest(),
                hashlib.sha256(index.encode()).hexdigest(),
            )
        )
    manifest = Manifest(
        dataset="digits",
        split="val",
        classes=tuple(classes),
        class_names=tuple(names),
        class_counts=tuple(counts),
        shards=tuple(shards),
        provenance={"sources": ["scikit-learn digits"]},
    )
    info = {
        "splits": {
            "val": {
                "name": "val",
                "filenames": [s.name for s in shards],
                "shard_lengths": [s.samples for s in shards],
                "num_samples": number,
            }
        }
    }
    (directory / "_info.json").write_text(json.dumps(info))
    manifest.save(directory)
    return manifest


def tree(run, val="", *, window=WINDOW, size=SIZE, name="l2vit_mini"):
    """A resolved training configuration as a checkpoint records it."""
    config = configuration.from_tree(
        TrainConfig,
        {
            "run": {"dir": str(run)},
            "model": {"name": name, "window_size": window},
            "schedule": {"global_batch": 8},
        },
    )
    config.data.input_size = size
    config.data.val = str(val)
    config.eval.crop_fraction, config.eval.crop_mode = 1.0, "squash"
    return configuration.to_tree(config)


def write_checkpoint(
    run, model, *, step=7, classes=WNIDS, names=NAMES, ema=None, world=1, val="", **options
):
    """A checkpoint as the trainer leaves it, its tensors cut into runs over ``world`` parts."""
    directory = checkpoint.step_directory(Path(run), step)
    directory.mkdir(parents=True)
    parameters = {name for name, _ in model.named_parameters()}
    whole = {
        ("param/" if name in parameters else "buffer/") + name: tensor
        for name, tensor in model.state_dict().items()
    }
    whole |= {f"ema/{name}": tensor for name, tensor in (ema or {}).items() if name in parameters}
    parts = []
    for rank in range(world):
        listed = []
        for key, tensor in whole.items():
            flat = tensor.detach().reshape(-1)
            if key.startswith("buffer/"):
                if rank == 0:
                    listed.append((TensorSlice(key, tuple(tensor.shape), 0, len(flat)), flat))
                continue
            edges = [len(flat) * r // world for r in range(world + 1)]
            run_of = flat[edges[rank] : edges[rank + 1]]
            if len(run_of):
                listed.append(
                    (TensorSlice(key, tuple(tensor.shape), edges[rank], len(run_of)), run_of)
                )
        parts.append(checkpoint.write_part(directory / checkpoint.part_name(rank, world), listed))
    meta = CheckpointMeta(
        step=step,
        epoch=1,
        images_seen=8 * step,
        config=tree(run, val, **options),
        classes=tuple(classes),
        class_names=tuple(names),
        class_hash=hashlib.sha256("".join(f"{c}\n" for c in classes).encode()).hexdigest(),
        manifest_hash="m" * 64,
        data={"sources": ["scikit-learn digits"]},
        git_commit="0123abc",
        versions={"torch": torch.__version__},
        metrics={"val/top1_percent": 50.0},
        has_ema=ema is not None,
    )
    checkpoint.commit(directory, meta, parts)
    return directory


def make_model(classes=10, seed=0, name="l2vit_mini", window=WINDOW):
    """A miniature whose answers differ from picture to picture, running statistics included."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=classes, window_size=window)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, 3, SIZE, SIZE))
    return model.eval()
