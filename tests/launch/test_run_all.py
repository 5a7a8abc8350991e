"""launch/run_all.sh for real: two small releases to two timm models, killed once in every stage."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
CLASSES, TRAIN, VAL = 4, 60, 12
STAGES = {
    "shards22k": "imagenet22k/.build",
    "shards1k": "imagenet1k/train/.build",
    "pretrain": "pretrain/metrics.jsonl",
    "finetune224": "finetune224/metrics.jsonl",
    "finetune384": "finetune384/metrics.jsonl",
    "export224": "timm224.tmp",
    "export384": "timm384.tmp",
}
"""What is there when a stage is at work, under OUT."""
LONGEST = 300


def jpeg(pixels):
    picture = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).resize((64, 64))
    out = io.BytesIO()
    picture.convert("RGB").save(out, "JPEG", quality=95)
    return out.getvalue()


def tar(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def meta_mat(wnids):
    """The devkit's table of classes, numbered from 1."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    table = np.array([(n + 1, wnid, f"digit {n}", 0) for n, wnid in enumerate(wnids)], fields)
    out = io.BytesIO()
    savemat(out, {"synsets": table.reshape(-1, 1)})
    return out.getvalue()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """An archive of class archives, as 22k is shipped, and the three files of ImageNet-1k."""
    root = tmp_path_factory.mktemp("raw")
    digits = load_digits()
    classes, validation, answers = [], [], []
    for digit in range(CLASSES):
        wnid, images = f"n{digit:08d}", digits.images[digits.target == digit][: TRAIN + VAL]
        named = [(f"{wnid}_{n}.JPEG", jpeg(pixels)) for n, pixels in enumerate(images)]
        classes.append((f"{wnid}.tar", tar(named[:TRAIN])))
        for _, data in named[TRAIN:]:
            name = f"ILSVRC2012_val_{len(validation) + 1:08d}.JPEG"
            validation.append((name, data))
            answers.append(f"{digit + 1}\n")
    (root / "winter21.tar").write_bytes(tar(classes))
    (root / "1k").mkdir()
    (root / "1k" / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    (root / "1k" / "ILSVRC2012_img_val.tar").write_bytes(tar(validation))
    with tarfile.open(root / "1k" / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as kit:
        for name, data in (
            ("ILSVRC2012_validation_ground_truth.txt", "".join(answers).encode()),
            ("meta.mat", meta_mat([wnid.removesuffix(".tar") for wnid, _ in classes])),
        ):
            entry = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            entry.size = len(data)
            kit.addfile(entry, io.BytesIO(data))
    return root


def start(archives, out, mark):
    """run_all.sh on the small recipes; everything it starts has ``mark`` in its environment."""
    environment = {
        **os.environ,
        "MARK": mark,
        "IN22K": str(archives / "winter21.tar"),
        "IN1K": str(archives / "1k"),
        "OUT": str(out),
        "PRETRAIN": "pretrain/configs/quickstart_pretrain.yaml",
        "FINETUNE_224": "finetune/configs/quickstart_finetune.yaml",
        "FINETUNE_384": "finetune/configs/quickstart_finetune.yaml",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    settings = ["schedule.length=4 epochs", "eval.every=2 epochs", "checkpoint.every=2 steps"]
    settings += ["schedule.warmup=1 epochs", "schedule.global_batch=16", "log.every=1"]
    with (archives / f"{mark}.log").open("ab") as log:
        return subprocess.Popen(
            ["bash", "launch/run_all.sh", "--", *settings],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def marked(mark):
    wanted = f"MARK={mark}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (place / "environ").read_bytes().split(b"\0"):
                yield int(place.name)


def kill_all(process, mark):
    """SIGKILL to all that the run started, until nothing is left of it."""
    while pids := list(marked(mark)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)


def wait_for(place, process):
    limit = time.monotonic() + LONGEST
    while not place.exists():
        assert process.poll() is None, f"ended before {place} was there"
        assert time.monotonic() < limit, f"{place} did not appear"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_two_models(archives, tmp_path):
    whole, mark = tmp_path / "whole", uuid.uuid4().hex
    assert start(archives, whole, mark).wait() == 0, (archives / f"{mark}.log").read_text()[-3000:]

    killed, mark = tmp_path / "killed", uuid.uuid4().hex
    for stage, place in STAGES.items():
        process = start(archives, killed, mark)
        wait_for(killed / place, process)
        time.sleep(0.3)
        kill_all(process, mark)
        assert not (killed / "finished" / stage).exists(), f"{stage} was over before the kill"
    status = start(archives, killed, mark).wait()
    assert status == 0, (archives / f"{mark}.log").read_text()[-3000:]

    for size in ("224", "384"):
        models = [
            safetensors.numpy.load_file(out / f"timm{size}" / "model.safetensors")
            for out in (whole, killed)
        ]
        assert models[0].keys() == models[1].keys()
        for name in models[0]:
            assert np.array_equal(models[0][name], models[1][name]), name
        right = [json.loads((out / f"accuracy{size}.json").read_text()) for out in (whole, killed)]
        assert right[0]["count"] == right[1]["count"] == CLASSES * VAL
        assert right[0]["top1_right"] == right[1]["top1_right"] > CLASSES * VAL / 2
