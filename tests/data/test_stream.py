"""Streaming through a pipe: labels with their pictures, same augmentation, broken shards left."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photo_shards import write_shards

from l2vit.config import from_tree
from l2vit.data.augment import AugmentSampler
from l2vit.data.batch import TrainPlanner
from l2vit.data.config import AugmentConfig, DataConfig
from l2vit.data.loader import train_loader
from l2vit.data.order import SampleOrder, Share, Split
from l2vit.data.stream import StreamTrainSet
from l2vit.errors import ConfigError, UserError
from l2vit.train.classification import Classification
from l2vit.train.config import TrainConfig

ORDER = {"seed": 0, "chunk": 4, "global_batch": 4}


def make(shards, *, rank=0, world=1, threads=0, seen=0, limit=10, log=None, **options):
    settings = {
        "train": str(shards.directory / "absent"),
        "stream": f"pipe:cat {shards.directory}/{{shard}} 2>/dev/null",
        "stream_buffer": 5,
        **options,
    }
    return train_loader(
        DataConfig(
            backend="pil", input_size=32, threads=threads, max_bad_samples=limit, **settings
        ),
        AugmentConfig(auto_augment="", erase_prob=0.0),
        manifest=shards.manifest,
        split=Split(4, 1, world),
        rank=rank,
        seed=2,
        device=torch.device("cpu"),
        images_seen=seen,
        bad_samples_log=log,
    )


def test_samples_are_those_of_the_shards(shards):
    """Without an index a sample still has its number, hence its label and its augmentation."""
    from l2vit.data import pil

    loader = make(shards)
    batches = [next(loader) for _ in range(13)]
    ids = np.concatenate([batch.sample_ids for batch in batches])
    assert len(np.unique(ids)) == len(ids) == 52  # at most once in a pass (60, 5 in the buffer)
    sampler = AugmentSampler(AugmentConfig(auto_augment="", erase_prob=0.0), input_size=32, seed=2)
    for batch in batches:
        assert batch.labels.tolist() == [shards.labels[i] for i in batch.sample_ids]
    first, picture = batches[0], pil.decode(shards.images[batches[0].sample_ids[0]])
    drawn = sampler.sample(0, first.sample_ids[:1])
    box = sampler.boxes(drawn, np.array([picture.shape[:2]]))[0]
    expected = pil.crop_resize(picture, box, 32, "bicubic")
    expected = expected[:, ::-1] if drawn.flip[0] else expected
    mean, std = (torch.tensor(getattr(AugmentConfig(), name)) for name in ("mean", "std"))
    found = (first.images[0].permute(1, 2, 0) * std + mean) * 255
    np.testing.assert_array_equal(found.round().numpy(), expected)
    np.testing.assert_array_equal(first.positions, np.arange(4))


def stream_set(shards, *, seen=0, buffer=1):
    order = SampleOrder("h", [s.samples for s in shards.manifest.shards], **ORDER)
    augment = AugmentConfig(auto_augment="", erase_prob=0.0)
    return StreamTrainSet(
        url=f"pipe:cat {shards.directory}/{{shard}}",
        directory=shards.directory,
        manifest=shards.manifest,
        planner=TrainPlanner(order, Share(0, Split(4, 1, 1)), seen),
        sampler=AugmentSampler(augment, input_size=8, seed=0),
        seed=0,
        buffer=buffer,
        limit=0,
    )


def test_workers_share_shards_and_places(shards, monkeypatch):
    """torch takes their batches in turn: the n-th of all must fill the plan's n-th places."""
    dataset, ids, batches = stream_set(shards), [], []
    for worker in range(2):
        info = SimpleNamespace(id=worker, num_workers=2)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda info=info: info)
        batches.append(list(itertools.islice(dataset, 5)))
        ids.append({int(i) for batch in batches[-1] for i in batch.ids})
    assert not ids[0] & ids[1] and len(ids[0]) == len(ids[1]) == 20
    for number, batch in enumerate(itertools.chain(*zip(*batches, strict=True))):
        assert batch.plan.number == number
        np.testing.assert_array_equal(batch.plan.positions, 4 * number + np.arange(4))


def test_passes_and_resumed_runs_are_shuffled_anew(shards):
    def ids(**options):
        batches = itertools.islice(stream_set(shards, **options), 30)
        return np.concatenate([batch.ids for batch in batches])

    def shards_of(part):
        return list(dict.fromkeys((part // 13).tolist()))

    first, second = np.split(ids(), 2)
    assert sorted(first) == sorted(second) == list(range(60))
    assert (np.diff(first) == 1).sum() == 60 - 5  # a buffer of one mixes nothing
    assert shards_of(first) != shards_of(second)
    assert shards_of(ids(seen=16)[:60]) != shards_of(first)
    mixed = ids(buffer=20)[:40]
    assert (np.diff(mixed) == 1).sum() < 10 and len(set(mixed.tolist())) == 40


def test_ranks_read_disjoint_shards(shards):
    ids = []
    for rank in range(2):
        loader = make(shards, rank=rank, world=2)
        ids.append({int(i) for _ in range(4) for i in next(loader).sample_ids})
    assert not ids[0] & ids[1]


def test_a_broken_stream_is_left_and_recorded(make_shards, tmp_path):
    shards = make_shards()
    path = shards.directory / shards.manifest.shards[2].name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    log = tmp_path / "bad.jsonl"
    loader = make(shards, log=log)
    for _ in range(14):
        batch = next(loader)
        assert batch.labels.tolist() == [shards.labels[i] for i in batch.sample_ids]
    loader.close()
    (line,) = map(json.loads, log.read_text().splitlines())
    assert line["shard"] == path.name and "the stream broke" in line["reason"]
    for shard in shards.manifest.shards:
        (shards.directory / shard.name).unlink()
    with pytest.raises(UserError, match="the stream broke"):
        next(make(shards))


def rewritten(shards, number, change):
    """Write a shard again with its members, [(name, content)], as ``change`` gives them."""
    path = shards.directory / shards.manifest.shards[number].name
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def by_name(members):
    """Other makers' way: .cls before .jpg, a member nobody asked for, a picture missing."""
    more = [(name.replace("jpg", "json"), b"{}") for name, _ in members if "jpg" in name]
    return [item for item in sorted(members + more) if item[0] != "s000030.jpg"]


def test_pictures_and_labels_meet_by_key(make_shards, tmp_path):
    shards = make_shards(checksums=False)
    for number in range(5):
        rewritten(shards, number, by_name)
    log = tmp_path / "bad.jsonl"
    loader = make(shards, log=log)
    for _ in range(14):
        batch = next(loader)
        assert batch.labels.tolist() == [shards.labels[i] for i in batch.sample_ids]
        assert 30 not in batch.sample_ids
    (line,) = map(json.loads, log.read_text().splitlines())
    assert line["key"] == "s000030" and line["sample_id"] == 30 and "no .jpg" in line["reason"]


def test_checksums_beside_the_manifest_are_used(make_shards, tmp_path):
    """A changed digit is still a label: only the checksum tells."""
    shards = make_shards()
    rewritten(shards, 1, lambda m: [(n, b"00009" if n == "s000014.cls" else d) for n, d in m])
    rewritten(shards, 3, lambda members: members[:-2])
    log = tmp_path / "bad.jsonl"
    loader = make(shards, train=str(shards.directory), log=log)
    ids = np.concatenate([next(loader).sample_ids for _ in range(18)])
    assert not {14, 51} & set(ids.tolist())
    reasons = {(r := json.loads(x))["sample_id"]: r["reason"] for x in log.read_text().splitlines()}
    assert reasons == {
        14: "checksum differs from the one recorded",
        51: "the stream broke: 1 of 13 samples did not come",
    }


@pytest.mark.parametrize(
    "rotten, limit, reason, told, opened",
    [
        ("sums", 3, "checksum", "4 unusable samples, more than data.max_bad_samples=3", 1),
        ("pictures", 3, "decoded", "4 unusable samples, more than data.max_bad_samples=3", 1),
        ("sums", 99, "checksum", "60 unusable samples, and no good one is left", 5),
        ("pictures", 99, "decoded", "60 unusable samples, and no good one is left", None),
    ],
)
def test_a_stream_of_bad_samples_ends_at_the_limit(
    tmp_path, pictures, rotten, limit, reason, told, opened
):
    """Nothing fills a batch with which to tell of them: the shards must not be read for ever."""
    if rotten == "pictures":
        pictures = [b"\xff\xd8 no picture \xff\xd9"] * len(pictures)
    shards = write_shards(tmp_path / "s", pictures, [0] * 60, per_shard=13, classes=1)
    if rotten == "sums":
        for path in shards.directory.glob("*.crc"):
            np.zeros(13, "<u4").tofile(path)
    command = f"pipe:echo {{shard}} >> {tmp_path}/opened; cat {shards.directory}/{{shard}}"
    with pytest.raises(UserError, match=rf"^{told}.*{reason}"):
        next(make(shards, train=str(shards.directory), stream=command, limit=limit))
    assert opened in (None, len((tmp_path / "opened").read_text().splitlines()))


def test_settings_that_cannot_be_are_refused(shards):
    with pytest.raises(ConfigError, match="5 shards are too few for 6 readers"):
        make(shards, world=3, threads=2)
    for wrong, what in [
        ({"stream": "s3://x/{shard}", "backend": "dali"}, "only backend pil"),
        ({"stream": "s3://x", "backend": "pil"}, "must hold {shard}"),
        ({"stream": "{shard}", "backend": "pil", "subset": {"fraction": 0.5}}, "subset"),
    ]:
        with pytest.raises(ConfigError, match=what):
            from_tree(DataConfig, wrong)


def test_a_run_that_streams_needs_the_manifest_alone(shards, tmp_path):
    shutil.copy(shards.directory / "manifest.json", tmp_path)
    tree = {
        "run": {"dir": str(tmp_path)},
        "model": {"name": "l2vit_mini"},
        "schedule": {"global_batch": 4},
        "data": {"train": str(tmp_path), "backend": "pil", "stream": "pipe:cat {shard}"},
    }
    task = Classification(from_tree(TrainConfig, tree))
    assert task.data.manifest_hash == shards.manifest.hash
    del tree["data"]["stream"]
    with pytest.raises(UserError, match="missing shard file"):
        Classification(from_tree(TrainConfig, tree))
