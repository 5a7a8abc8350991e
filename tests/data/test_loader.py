"""Both backends over real files: one order, one augmentation, exact evaluation, exact resume."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from photo_shards import jpeg, photo, write_shards
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from l2vit.data import loader as loader_module
from l2vit.data.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentConfig,
    DataConfig,
    EvalConfig,
    EvalSetConfig,
    SubsetConfig,
)
from l2vit.data.dali import build_graph
from l2vit.data.loader import eval_loader, train_loader
from l2vit.data.order import split
from l2vit.errors import ConfigError, UserError
from l2vit.launch import processes

CPU = torch.device("cpu")
PLAIN = AugmentConfig(auto_augment="", erase_prob=0.0)
GLOBAL = 16


def make_train(shards, backend, *, augment=None, rank=0, world=1, micro=16, seen=0, **data):
    settings = {"threads": 1, "input_size": 64, **data}
    return train_loader(
        DataConfig(train=str(shards.directory), backend=backend, **settings),
        augment or AugmentConfig(),
        manifest=shards.manifest,
        split=split(GLOBAL, world=world, micro_batch=micro),
        rank=rank,
        seed=11,
        device=CPU,
        images_seen=seen,
    )


def take(loader, count):
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def in_bytes(images: torch.Tensor) -> np.ndarray:
    """Normalised images as values of 0 … 255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images * std + mean) * 255).numpy()


@pytest.mark.parametrize("threads, interpolation", [(0, "bilinear"), (2, "bicubic")])
def test_backends_give_the_same_samples_and_pictures(shards, threads, interpolation):
    augment = AugmentConfig(interpolation=interpolation)
    host = take(make_train(shards, "pil", augment=augment, threads=threads), 7)
    dali = take(make_train(shards, "dali", augment=augment), 7)
    differences = []
    for ours, theirs in zip(host, dali, strict=True):
        np.testing.assert_array_equal(ours.sample_ids, theirs.sample_ids)
        np.testing.assert_array_equal(ours.positions, theirs.positions)
        assert ours.epoch == theirs.epoch and torch.equal(ours.labels, theirs.labels)
        assert ours.labels.tolist() == [shards.labels[i] for i in ours.sample_ids]
        assert ours.images.dtype == torch.float32 and ours.images.shape == (16, 3, 64, 64)
        for batch in (ours, theirs):
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
        differences.append(np.abs(in_bytes(ours.images) - in_bytes(theirs.images)).mean())
    assert host[-1].epoch == 2
    assert np.mean(differences) < 0.4, differences


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_plain_pictures_equal_timms_transform(shards, backend):
    """Without RandAugment: decode, timm's crop of the drawn box, flip, normalise."""
    from l2vit.data.augment import AugmentSampler

    (batch,) = take(make_train(shards, backend, augment=PLAIN), 1)
    sampler = AugmentSampler(PLAIN, input_size=64, seed=11)
    drawn = sampler.sample(0, batch.sample_ids)
    for place, sample in enumerate(batch.sample_ids.tolist()):
        image = Image.open(io.BytesIO(shards.images[sample])).convert("RGB")
        boxes = sampler.boxes(drawn, np.tile([image.height, image.width], (16, 1)))
        top, left, height, width = boxes[place].tolist()
        image = image.crop((left, top, left + width, top + height)).resize((64, 64), Image.BICUBIC)
        if drawn.flip[place]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found = in_bytes(batch.images[place]).transpose(1, 2, 0)
        assert np.abs(found - np.asarray(image, float)).mean() < (0.02 if backend == "pil" else 0.4)


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_any_world_and_any_resume_point_sees_the_same_pictures(shards, backend):
    whole = take(make_train(shards, backend), 6)
    for world, micro, first_step in [(2, 4, 2), (4, 4, 3), (1, 8, 5)]:
        accumulation = GLOBAL // (world * micro)
        for rank in range(world):
            loader = make_train(
                shards, backend, rank=rank, world=world, micro=micro, seen=first_step * GLOBAL
            )
            for number, batch in enumerate(take(loader, (6 - first_step) * accumulation)):
                step, micro_step = divmod(number, accumulation)
                reference = whole[first_step + step]
                first = (micro_step * world + rank) * micro
                part = slice(first, first + micro)
                np.testing.assert_array_equal(batch.sample_ids, reference.sample_ids[part])
                np.testing.assert_array_equal(batch.positions, reference.positions[part])
                assert torch.equal(batch.images, reference.images[part])
                assert torch.equal(batch.labels, reference.labels[part])


def test_every_kind_of_jpeg_looks_the_same_to_both(tmp_path):
    """Grey, CMYK, RGB inside, progressive, other sampling, turned by EXIF, a pixel wide."""
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = [
        ("L", (90, 70), {}),
        ("CMYK", (90, 70), {}),
        ("RGB", (90, 70), {"keep_rgb": True}),
        ("RGB", (90, 70), {"progressive": True}),
        ("RGB", (90, 70), {"subsampling": "4:4:4"}),
        ("RGB", (90, 70), {"subsampling": "4:2:2"}),
        ("RGB", (90, 70), {"exif": turned}),
        ("RGB", (1, 300), {}),
    ]
    images = []
    for seed, (mode, size, options) in enumerate([*kinds, *kinds]):
        stream = io.BytesIO()
        picture = Image.fromarray(photo(seed, 90, 70)).resize(size)
        picture.convert(mode).save(stream, "JPEG", **options)
        images.append(stream.getvalue())
    shards = write_shards(tmp_path, images, [0] * 16, per_shard=16, classes=1)
    (host,) = take(make_train(shards, "pil", augment=PLAIN, threads=0), 1)
    (dali,) = take(make_train(shards, "dali", augment=PLAIN), 1)
    np.testing.assert_array_equal(host.sample_ids, dali.sample_ids)
    apart = np.abs(in_bytes(host.images) - in_bytes(dali.images)).mean((1, 2, 3))
    assert apart.max() < 0.4, apart[np.argsort(host.sample_ids)]


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_a_subset_is_all_a_run_sees(shards, tmp_path, backend):
    classes = tmp_path / "classes.txt"
    classes.write_text("n00000003\nn00000007\nn00000008\nn00000001\n")
    wanted = [i for i, label in enumerate(shards.labels) if label in (1, 3, 7, 8)]
    subset = SubsetConfig(classes=str(classes))
    loader = make_train(shards, backend, augment=PLAIN, threads=1, subset=subset)
    assert loader.order.samples == len(wanted) > GLOBAL
    for batch in take(loader, 5):
        assert len(set(batch.sample_ids) & set(wanted)) == GLOBAL
        assert batch.labels.tolist() == [shards.labels[i] for i in batch.sample_ids]


def test_erasing_lies_on_the_normalised_picture(shards):
    erased = take(make_train(shards, "pil", augment=AugmentConfig(auto_augment="")), 6)
    plain = take(make_train(shards, "pil", augment=PLAIN), 6)
    changed = 0
    for ours, theirs in zip(erased, plain, strict=True):
        different = (ours.images != theirs.images).any(1)
        for mask, image in zip(different, ours.images, strict=True):
            if not mask.any():
                continue
            changed += 1
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.float().mean() > 0.99
            noise = image[:, mask]
            assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.3
    assert 10 < changed < 40  # a quarter of 96


@pytest.mark.parametrize("mode, fraction", [("center", 0.875), ("squash", 1.0), ("squash", 0.9)])
def test_evaluation_is_timms(shards, mode, fraction):
    transform = transforms_imagenet_eval(
        64, crop_pct=fraction, crop_mode=mode, interpolation="bicubic"
    )
    expected = torch.stack(
        [transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in shards.images]
    )
    for backend, world in (("pil", 1), ("dali", 1), ("pil", 7), ("dali", 7)):
        ids, images, labels, lengths = [], [], [], set()
        for rank in range(world):
            loader = make_eval(shards, backend, mode, fraction, rank, world)
            first, second = list(loader), list(loader)
            lengths.add(len(first))
            assert len(loader) == len(first) == len(second) and loader.manifest == shards.manifest
            assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
            ids += [int(i) for batch in first for i in batch.sample_ids]
            labels += [int(i) for batch in first for i in batch.labels]
            images += [batch.images for batch in first]
            loader.close()
        assert sorted(ids) == list(range(60)) and len(lengths) == 1
        assert labels == [shards.labels[i] for i in ids]
        difference = np.abs(in_bytes(torch.cat(images)) - in_bytes(expected[ids])).mean()
        assert difference < (1e-4 if backend == "pil" else 0.2), (backend, difference)


@pytest.mark.parametrize("size, mode, fraction", [(224, "center", 0.875), (384, "squash", 1.0)])
def test_evaluation_at_full_size(tmp_path, size, mode, fraction):
    """As the recipes evaluate, on pictures of ImageNet's usual sizes; more ranks than pictures."""
    images = [jpeg(photo(i, w, h)) for i, (w, h) in enumerate([(500, 375), (333, 500), (700, 400)])]
    shards = write_shards(tmp_path, images, [2, 0, 1], per_shard=2, classes=3)
    transform = transforms_imagenet_eval(
        size, crop_pct=fraction, crop_mode=mode, interpolation="bicubic"
    )
    for backend, world in (("pil", 1), ("dali", 1), ("dali", 5)):
        found = {}
        for rank in range(world):
            loader = make_eval(shards, backend, mode, fraction, rank, world, size=size)
            batches = list(loader)
            loader.close()
            assert len(batches) == 1 and batches[0].images.shape[1:] == (3, size, size)
            found |= dict(zip(batches[0].sample_ids.tolist(), batches[0].images, strict=True))
        assert sorted(found) == [0, 1, 2]
        for sample, image in found.items():
            expected = transform(Image.open(io.BytesIO(images[sample])))
            assert np.abs(in_bytes(image) - in_bytes(expected)).mean() < 0.2


def make_eval(
    shards, backend, mode="center", fraction=0.875, rank=0, world=1, batch=4, size=64, prefetch=2
):
    return eval_loader(
        EvalSetConfig(str(shards.directory)),
        DataConfig(backend=backend, input_size=size, threads=1, prefetch=prefetch),
        EvalConfig(batch=batch, crop_fraction=fraction, crop_mode=mode),
        PLAIN,
        rank=rank,
        world=world,
        device=CPU,
    )


@pytest.mark.parametrize("backend, prefetch", [("pil", 2), ("dali", 1), ("dali", 3)])
def test_evaluation_left_early_starts_over(shards, backend, prefetch):
    loader = make_eval(shards, backend, prefetch=prefetch)
    for batch in loader:
        if batch.sample_ids[0] >= 8:
            break
    assert [int(i) for batch in loader for i in batch.sample_ids] == list(range(60))


READ = """
import sys
from pathlib import Path
import torch
from l2vit.data.config import AugmentConfig, DataConfig
from l2vit.data.loader import train_loader
from l2vit.data.manifest import Manifest
from l2vit.data.order import Split
directory, rank = sys.argv[1], int(sys.argv[2])
loader = train_loader(
    DataConfig(train=directory, backend="pil", threads=0, input_size=32), AugmentConfig(),
    manifest=Manifest.load(Path(directory)), split=Split(8, 1, 2), rank=rank,
    seed=11, device=torch.device("cpu"))
for _ in range(3):
    print(*next(loader).sample_ids)
"""


def test_two_processes_read_disjoint_samples(shards):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", READ, str(shards.directory), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [[set(line.split()) for line in w.communicate()[0].splitlines()] for w in workers]
    steps = [a | b for a, b in zip(*found, strict=True)]
    assert [len(step) for step in steps] == [GLOBAL] * 3
    assert len(set.union(*steps)) == 3 * GLOBAL


KILLED = READ.replace("threads=0", "threads=1").replace(
    "for _ in range(3):\n    print(*next(loader).sample_ids)",
    "next(loader)\nimport os, time\nprint('ready', flush=True)\ntime.sleep(600)",
)


def test_workers_do_not_outlive_a_killed_run(shards):
    """Every process of the run holds its standard output: when all are gone it ends."""
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(shards.directory), "0"], stdout=subprocess.PIPE
    )
    assert run.stdout.readline() == b"ready\n"
    run.kill()
    assert run.communicate(timeout=300)[0] == b""


NOT_CLOSED = (
    READ.replace('backend="pil", threads=0', 'backend="dali", threads=1').replace(
        "import sys\n",
        """import atexit, sys
last_is_first, register = [], atexit.register
def note(end, *given, **named):
    last_is_first.insert(0, getattr(end, "__qualname__", ""))
    return register(end, *given, **named)
atexit.register = note
""",
    )
    + """
next(loader)
mine = [name for name in last_is_first if name in ("_Prefetcher.close", "_shutdown_pipelines")]
print(*mine)
"""
)


def test_dali_is_shut_down_after_the_thread_that_uses_it(shards):
    """A program that does not close its loader: the thread would build a graph while DALI ends."""
    command = [sys.executable, "-c", NOT_CLOSED, str(shards.directory), "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "_Prefetcher.close _shutdown_pipelines"


SIGNALLED = READ.replace("threads=0", "threads=1").replace(
    "for _ in range(3):", "next(loader)\nprint('ready', flush=True)\ninput()\nfor _ in range(9):"
)


def test_every_process_of_a_run_outlives_the_signals_that_ask_it_to_save(shards):
    """Slurm signals all: the worker, the server it was forked from, multiprocessing's tracker."""
    run = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED, str(shards.directory), "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert run.stdout.readline() == "ready\n"
        others = [p.pid for p in processes.members(run.pid) if p.pid != run.pid]
        assert len(others) == 3
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            processes.send(others, number)
        output, _ = run.communicate("\n", timeout=300)
        assert run.returncode == 0 and len(output.splitlines()) == 9
    finally:
        processes.end_session(run.pid, grace=0.0)


FAILING = READ.replace("threads=0", "threads=1, max_bad_samples=0").replace("range(3)", "range(99)")


def test_a_failed_run_ends(make_shards):
    """Its error's traceback, which holds the loader's frames, must not keep the workers waiting."""
    shards = make_shards()
    (shards.directory / shards.manifest.shards[2].name).write_bytes(b"")
    command = [sys.executable, "-c", FAILING, str(shards.directory), "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and "1 unusable samples" in run.stderr


def test_workers_outlive_the_signals_that_ask_a_run_to_save(shards):
    """Slurm and terminals signal all processes; the step under way still needs its batches."""
    others = set(multiprocessing.active_children())
    loader = make_train(shards, "pil", threads=1, micro=4)
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - others
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.pid, number)
    expected = take(make_train(shards, "pil", threads=0, micro=4), 9)
    for batch in expected[1:]:
        assert torch.equal(next(loader).images, batch.images)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"pictures was killed \(.*data.threads"):
        [next(loader) for _ in range(9)]
    loader.close()
    with pytest.raises(UserError):
        next(loader)
    assert worker not in multiprocessing.active_children()


def test_a_thread_that_cannot_begin_is_told_of(monkeypatch):
    """Whoever waits for its first batch must hear of it."""

    def refused(device):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "Stream", refused)
    ahead = loader_module._Prefetcher(iter(()), torch.device("cuda"))
    with pytest.raises(RuntimeError, match="out of memory"):
        next(ahead)


def test_webp_shards_load(tmp_path, pictures):
    images = []
    for image in pictures[:20]:
        stream = io.BytesIO()
        Image.open(io.BytesIO(image)).save(stream, "WEBP", lossless=True)
        images.append(stream.getvalue())
    shards = write_shards(
        tmp_path, images, [0] * 20, per_shard=20, classes=1, extension="webp", checksums=False
    )
    (host,) = take(make_train(shards, "pil", augment=PLAIN), 1)
    (dali,) = take(make_train(shards, "dali", augment=PLAIN), 1)
    assert np.abs(in_bytes(host.images) - in_bytes(dali.images)).mean() < 0.35


def test_the_gpu_graph_is_well_formed():
    """Serialising checks operators, devices and arguments without a driver."""

    def graph(gpu):
        return build_graph(
            lambda: (),
            batch=8,
            input_size=224,
            interpolation="bicubic",
            threads=2,
            prefetch=2,
            gpu=gpu,
            device_id=None,
        ).serialize()

    gpu, cpu = graph(True), graph(False)
    assert b"mixed" in gpu and b"mixed" not in cpu
    assert b"ImageSlice" in gpu and b"ImageSlice" in cpu and b"Resize" in cpu
    from nvidia.dali import backend

    assert "decoders__ImageSlice" in backend.RegisteredMixedOps()
    for operator in ("Resize", "Slice", "Flip"):
        assert operator.encode() in gpu and operator in backend.RegisteredGPUOps()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_graph_gives_pils_pictures(pictures, interpolation):
    images = [np.frombuffer(image, np.uint8) for image in pictures[:12]]
    opened = [Image.open(io.BytesIO(image)).convert("RGB") for image in pictures[:12]]
    boxes = np.array([[3, 5, p.height - 10, p.width - 8] for p in opened])
    sizes = np.array([[64 + 3 * i, 90 - 2 * i] for i in range(12)])
    windows = np.stack([sizes[:, 0] - 64, (sizes[:, 1] - 64) // 2], axis=1)
    flips = np.arange(12) % 3 == 0
    given = boxes[:, :2], boxes[:, 2:], sizes, windows, flips
    kinds = np.int32, np.int32, np.float32, np.int32, np.int32
    fed = (images, *(values.astype(kind) for values, kind in zip(given, kinds, strict=True)))
    graph = build_graph(
        lambda: fed,
        batch=12,
        input_size=64,
        interpolation=interpolation,
        threads=1,
        prefetch=1,
        gpu=False,
        device_id=None,
    )
    graph.build()
    found = np.asarray(graph.run()[0].as_tensor()).astype(float)
    filters = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}
    for i, picture in enumerate(opened):
        top, left, height, width = boxes[i].tolist()
        picture = picture.crop((left, top, left + width, top + height))
        expected = np.asarray(picture.resize(sizes[i, ::-1].tolist(), filters[interpolation]))
        down, right = windows[i].tolist()
        expected = expected[down : down + 64, right : right + 64]
        expected = expected[:, ::-1] if flips[i] else expected
        assert np.abs(found[i] - expected).mean() < 0.3  # grainy; photographs are nearer


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_evaluations_that_cannot_be_are_refused_when_a_run_begins(shards, backend):
    for fraction in (0.0, -1.0, 1.1):
        with pytest.raises(ConfigError, match=rf"crop_fraction: {fraction} must be in [\[(]0, 1\]"):
            make_eval(shards, backend, fraction=fraction)
    with pytest.raises(ConfigError, match="batch: 0 must be at least 1"):
        make_eval(shards, backend, batch=0)


def test_batch_sizes_that_do_not_divide_are_refused(shards):
    with pytest.raises(ConfigError, match=r"16 cannot be divided over 3 ranks"):
        make_train(shards, "pil", world=3, micro=1)
    with pytest.raises(UserError, match="not a multiple of the global batch"):
        make_train(shards, "pil", seen=8)
