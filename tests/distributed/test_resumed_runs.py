"""Killed, moved to another number of ranks, damaged: a run continues as if nothing had been."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from forked_ranks import Ranks
from small_runs import losses, settings, train

from l2vit.train import checkpoint
from l2vit.train.checkpoint import Reader


def finish(path, size, directory):
    ranks = Ranks(train, size, path, directory=directory, raw=True)
    assert ranks.wait() == [0] * size, ranks.log(0)[-3000:]
    return ranks


def all_tensors(run: Path):
    reader = Reader(checkpoint.find(run))
    reader.verify()
    return {key: reader.tensor(key) for key in reader.tensors}


def assert_same(run, expected):
    found = all_tensors(run)
    assert found.keys() == expected.keys()
    differing = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not differing


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """An uninterrupted run on two ranks: its directory."""
    folder = tmp_path_factory.mktemp("whole")
    run = folder / "run"
    finish(settings(shards, run), 2, folder)
    return run


def storm(shards, folder, kills, seed):
    """Kill a run ``kills`` times at random moments, saves included; then let it finish."""
    draw = random.Random(seed)
    run = folder / "run"
    path = settings(shards, run)
    progressed, steps = 0, []
    while len(steps) < kills:
        ranks = Ranks(train, 2, path, directory=folder, raw=True)
        marker = run / "metrics.jsonl"
        before = marker.stat().st_mtime_ns if marker.exists() else 0
        while ranks.processes[0].is_alive():  # from the first written record on
            if marker.exists() and marker.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(draw.choice([0.0, 0.05, 0.15, 0.4]) * draw.random())
        if draw.random() < 0.5:
            ranks.kill(draw.randrange(2))  # one rank: the other loses its peer
            ranks.wait(timeout=20)
        ranks.kill_all()
        done = checkpoint.complete_steps(run)
        steps.append(done[-1] if done else 0)
        progressed += len(steps) > 1 and steps[-1] > steps[-2]
        if (run / "DONE").exists():  # begin again: what counts are the kills
            shutil.rmtree(run)
    finish(path, 2, folder)
    return run, steps


def test_random_kills_leave_the_same_weights(shards, whole, tmp_path):
    run, steps = storm(shards, tmp_path, kills=20, seed=24)
    assert len(steps) == 20
    assert_same(run, all_tensors(whole))
    assert losses(run) == losses(whole)
    numbers = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert numbers == sorted(numbers), "a curve has double entries"
    assert sorted(set(numbers)) == list(range(1, 25))


def cut_back(run: Path, copy: Path, step: int):
    """A copy of ``run`` as it was after saving ``step``."""
    shutil.copytree(run, copy, symlinks=True)
    for later in checkpoint.complete_steps(copy):
        if later > step:
            shutil.rmtree(checkpoint.step_directory(copy, later))
    (copy / "DONE").unlink()
    return copy


def test_other_ranks_and_stages_continue_with_the_same_losses(shards, tmp_path):
    """2 → 1 → 4 ranks and stage 1 → 3, in fp32 and without BatchNorm: batches split otherwise."""
    plain = {
        "engine__precision": "fp32",
        "model__args": {"norm": False},
        "model__drop_path_rate": 0.0,
        "eval__every": "100 steps",
        "checkpoint__every": "8 steps",
        "checkpoint__keep_last": 10,
    }
    reference = tmp_path / "reference"
    finish(settings(shards, reference, **plain), 2, tmp_path)
    expected = losses(reference)

    moved = cut_back(reference, tmp_path / "moved", 8)
    first = {**plain, "schedule__length": "24 steps"}
    path = settings(shards, moved, **first, engine__zero_stage=2)
    stop_after(path, 1, tmp_path, moved, 16)
    finish(settings(shards, moved, **first, engine__zero_stage=3), 4, tmp_path)
    assert losses(moved) == pytest.approx(expected, rel=2e-6)
    found, wanted = all_tensors(moved), all_tensors(reference)
    ours = torch.cat([found[key].reshape(-1) for key in wanted if key.startswith("param/")])
    plain_ = torch.cat([wanted[key].reshape(-1) for key in wanted if key.startswith("param/")])
    assert (ours - plain_).norm() <= 1e-5 * plain_.norm()


def stop_after(path, size, folder, run, step):
    """Run on until ``step`` is saved, then forget what came later."""
    finish(path, size, folder)
    for later in checkpoint.complete_steps(run):
        if later > step:
            shutil.rmtree(checkpoint.step_directory(run, later))
    (run / "DONE").unlink()


def test_a_bf16_run_with_batchnorm_changes_its_stage(shards, whole, tmp_path):
    run = cut_back(whole, tmp_path / "run", 20)
    finish(settings(shards, run, engine__zero_stage=3), 2, tmp_path)
    found = all_tensors(run)
    for key, tensor in all_tensors(whole).items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.parametrize("harm", ["truncate", "flip", "missing", "index", "torn"])
def test_damage_is_noticed_and_the_previous_checkpoint_used(harm, shards, whole, tmp_path):
    run = cut_back(whole, tmp_path / "run", 24)
    newest = checkpoint.step_directory(run, 24)
    part = newest / checkpoint.part_name(1, 2)
    if harm == "truncate":
        part.write_bytes(part.read_bytes()[:-100])
    elif harm == "flip":
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 4
        part.write_bytes(data)
    elif harm == "missing":
        part.unlink()
    elif harm == "index":
        text = (newest / checkpoint.META_NAME).read_text()
        (newest / checkpoint.META_NAME).write_text(text.replace('"step": 24', '"step": 25', 1))
    else:
        (newest / checkpoint.META_NAME).unlink()
    ranks = finish(settings(shards, run), 2, tmp_path)
    said = ranks.log(0)
    assert "warning: " in said and "continuing from" in said
    assert "step 20" in said
    if harm in ("truncate", "flip", "missing"):
        assert part.name in said
    assert_same(run, all_tensors(whole))


def test_what_cannot_be_continued_is_refused_in_one_line(shards, whole, tmp_path):
    for number, (change, status, text) in enumerate(
        [
            ({"schedule__global_batch": 32}, 2, "schedule.global_batch"),
            ({"run__seed": 7}, 2, "run.seed"),
            ({"model__args": {"width": 16}}, 2, "model.args.width: "),
            ({"model__args": {"width": 16}}, 1, "checkpoint of another model: param/"),
            ({"engine__micro_batch": 3}, 2, "possible micro_batch×accumulation: 8×1, 4×2, 2×4"),
            ({"data__train": str(tmp_path / "no")}, 1, "holds no manifest.json"),
            ({"model__name": "l2vit_hug"}, 2, "timm knows no 'l2vit_hug'"),
            ({"engine__zero_stage": 0}, 2, "engine.zero_stage: 0 is not one of 1, 2, 3"),
        ]
    ):
        run = cut_back(whole, tmp_path / f"run{number}", 8)
        if status == 1 or "timm" in text:  # what the checkpoint itself refuses
            (run / "config.yaml").unlink()
        ranks = Ranks(train, 2, settings(shards, run, **change), directory=tmp_path, raw=True)
        assert ranks.wait() == [status] * 2, ranks.log(0)
        assert text in ranks.log(0)
        assert "Traceback" not in ranks.log(0) + ranks.log(1)
