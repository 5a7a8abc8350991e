"""The checkpoint format: pieces from any ranks, damage, retention."""

import json
import os
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from l2vit.errors import UserError
from l2vit.train import checkpoint
from l2vit.train.checkpoint import CheckpointMeta, DamagedCheckpoint, Reader, TensorSlice
from l2vit.train.config import CheckpointConfig
from l2vit.train.distributed import World
from l2vit.train.saver import Saver

META = {
    "epoch": 1,
    "images_seen": 64,
    "config": {"model": {"name": "x"}},
    "classes": ("a", "b"),
    "class_names": (),
    "class_hash": "c",
    "manifest_hash": "m",
}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "param/a": torch.randn(5, 7, generator=generator),
        "param/b": torch.randn(3, generator=generator),
        "ema/a": torch.randn(5, 7, generator=generator),
        "ema/b": torch.randn(3, generator=generator),
        "buffer/n": torch.tensor(7),
        "buffer/m": torch.randn(3, generator=generator),
        "ema/m": torch.randn(3, generator=generator),
    }


def write(run, step, world=3, **changes):
    """Each tensor cut into ``world`` unequal runs, one a part."""
    directory = checkpoint.step_directory(run, step)
    directory.mkdir(parents=True)
    parts = []
    for rank in range(world):
        pieces = []
        for key, tensor in tensors().items():
            flat = tensor.reshape(-1)
            low, high = (len(flat) * (rank + i) // world for i in (0, 1))
            if low < high:
                piece = TensorSlice(key, tuple(tensor.shape), low, high - low)
                pieces.append((piece, flat[low:high].clone()))
        name = checkpoint.part_name(rank, world)
        parts.append(checkpoint.write_part(directory / name, pieces))
    meta = CheckpointMeta(**{**META, "step": step, "has_ema": True, **changes})
    checkpoint.commit(directory, meta, parts)
    return directory


@pytest.mark.parametrize("world", [1, 3])
def test_tensors_come_back_from_any_number_of_parts(world, tmp_path):
    reader = Reader(write(tmp_path, 8, world))
    reader.verify()
    for key, tensor in tensors().items():
        assert torch.equal(reader.tensor(key), tensor)
    whole = tensors()["param/a"].reshape(-1)
    for start, numel in ((0, 35), (3, 20), (11, 1), (34, 1), (5, 0)):
        if numel:
            assert torch.equal(reader.read("param/a", start, numel), whole[start : start + numel])
    weights = checkpoint.read_weights(checkpoint.find(tmp_path), "raw")
    assert torch.equal(weights["a"], tensors()["param/a"]) and weights["n"] == 7
    averaged = checkpoint.read_weights(checkpoint.find(tmp_path), "auto")
    assert torch.equal(averaged["m"], tensors()["ema/m"]) and averaged["n"] == 7


def test_a_part_is_ordinary_safetensors(tmp_path):
    directory = write(tmp_path, 8, world=1)
    loaded = safetensors.torch.load_file(directory / checkpoint.part_name(0, 1))
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors().items())


def test_find_takes_the_newest_complete_one(tmp_path):
    first, second = write(tmp_path, 8), write(tmp_path, 16)
    assert checkpoint.find(tmp_path) == second
    assert checkpoint.find(tmp_path / "checkpoints") == second
    assert checkpoint.find(first) == first
    (second / checkpoint.META_NAME).unlink()
    assert checkpoint.torn_steps(tmp_path) == [16]
    assert checkpoint.find(tmp_path) == first
    os.truncate(first / checkpoint.part_name(0, 3), 10)
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find(tmp_path)


def test_every_flipped_byte_is_noticed(tmp_path):
    directory = write(tmp_path, 8)
    for name in [checkpoint.META_NAME, *(checkpoint.part_name(r, 3) for r in range(3))]:
        path = directory / name
        data = path.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 23)):
            harmed = bytearray(data)
            harmed[at] ^= 1
            path.write_bytes(harmed)
            with pytest.raises(UserError):
                Reader(directory).verify()
        path.write_bytes(data)
    Reader(directory).verify()


def test_retention(tmp_path):
    for step in range(4, 44, 4):
        directory = write(tmp_path, step, world=1)
        if step == 12:
            checkpoint.link_best(directory)
        checkpoint.prune(tmp_path, keep_last=2, keep_every=16)
    assert checkpoint.complete_steps(tmp_path) == [12, 16, 32, 36, 40]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-00000012"


def test_a_missing_average_and_a_missing_tensor_are_named(tmp_path):
    directory = write(tmp_path, 8, has_ema=False)
    with pytest.raises(UserError, match="keeps no EMA"):
        checkpoint.read_weights(directory, "ema")
    with pytest.raises(UserError, match="holds no param/c"):
        Reader(directory).tensor("param/c")


@pytest.mark.parametrize(
    ("raw", "ema", "evaluated", "which", "why"),
    [
        (37.2, 0.6, 8, "raw", "top1_percent on data.val: raw 37.20, ema 0.60"),
        (37.2, 41.0, 8, "ema", "raw 37.20, ema 41.00"),
        (37.2, 0.6, 4, "ema", "not compared"),
        (37.2, 0.6, None, "ema", "not compared"),  # written before figures had a step
    ],
)
def test_auto_takes_the_better_weights_by_the_figures_of_this_step(
    raw, ema, evaluated, which, why, tmp_path
):
    metrics = {"val/top1_percent": raw, "val_ema/top1_percent": ema, "big/top1_percent": 99.0}
    state = {} if evaluated is None else {"evaluated_step": evaluated, "headline": "/top1_percent"}
    reader = Reader(write(tmp_path, 8, metrics=metrics, state=state))
    choice = reader.choose()
    assert choice.which == which and why in choice.why
    expected = tensors()["param/a" if which == "raw" else "ema/a"]
    assert torch.equal(reader.weights()["a"], expected)
    assert reader.choose("raw").which == "raw" and reader.choose("ema").which == "ema"


def test_the_index_speaks_for_itself(tmp_path):
    content = json.loads((write(tmp_path, 8) / checkpoint.META_NAME).read_text())
    assert content["step"] == 8 and content["tensors"]["param/a"]["shape"] == [5, 7]
    with pytest.raises(DamagedCheckpoint, match="format"):
        path = tmp_path / "checkpoints" / "step-00000008" / checkpoint.META_NAME
        path.write_text("{}")
        Reader(path.parent)


def test_a_save_that_fails_in_any_way_is_told_and_counted(tmp_path, capfd):
    """Its thread's error would else be nobody's, and the run go on without checkpoints."""
    flags = {"buffer/flags": torch.zeros(3, dtype=torch.bool)}  # no part holds such a tensor
    engine = SimpleNamespace(average_buffers=lambda: None, tensors=list, buffers=lambda: flags)
    world = World(0, 1, 0, 1, torch.device("cpu"), "none")
    saver = Saver(tmp_path, CheckpointConfig(max_failures=2), world=world, keep_every=0)
    saver.start(engine, CheckpointMeta(step=1, **META))
    saver.finish()
    assert "step 1 not saved (1 of 2 failures in a row): rank 0: KeyError" in capfd.readouterr().err
    saver.start(engine, CheckpointMeta(step=2, **META))
    with pytest.raises(UserError, match="2 checkpoints in a row could not be saved"):
        saver.finish()
