"""Damage at run time: replaced, recorded, limited; never a wrong image under a right label."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource

import numpy as np
import pytest
import torch
from photo_shards import write_shards

from l2vit.data import pil
from l2vit.data.bad_samples import BadSampleLog
from l2vit.data.config import AugmentConfig, DataConfig, EvalConfig, EvalSetConfig
from l2vit.data.loader import eval_loader, train_loader
from l2vit.data.order import Split
from l2vit.data.shards import BadSample, ShardReader, _may_open
from l2vit.errors import UserError

PLAIN = AugmentConfig(auto_augment="", erase_prob=0.0, hflip=0.0, scale=(1, 1), ratio=(0.1, 10))


def place_of(shards, sample):
    """Tar path and index fields of a sample."""
    shard, number = ShardReader(shards.directory, shards.manifest).locate(sample)
    tar = shards.directory / shards.manifest.shards[shard].name
    return tar, tar.with_suffix(".idx").read_text().splitlines()[number + 1].split()


def flip_bit(shards, sample, *, member=0, at=0.6):
    tar, fields = place_of(shards, sample)
    offset, size = int(fields[4 * member + 1]), int(fields[4 * member + 2])
    data = bytearray(tar.read_bytes())
    data[offset + int(at * size)] ^= 1
    tar.write_bytes(bytes(data))


def make(shards, backend, log=None, limit=3, threads=1):
    return train_loader(
        DataConfig(
            train=str(shards.directory),
            backend=backend,
            input_size=32,
            threads=threads,
            max_bad_samples=limit,
        ),
        PLAIN,
        manifest=shards.manifest,
        split=Split(15, 1, 4),
        rank=2,
        seed=4,
        device=torch.device("cpu"),
        bad_samples_log=log,
    )


def epochs(loader, count=4):
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.parametrize("backend, threads", [("pil", 0), ("dali", 1)])
def test_damaged_samples_are_replaced_and_recorded(make_shards, tmp_path, backend, threads):
    shards = make_shards()
    clean = epochs(make(shards, backend, threads=threads))
    seen = np.unique(np.concatenate([batch.sample_ids for batch in clean]))
    picture, label = int(seen[3]), int(seen[9])
    flip_bit(shards, picture)  # somewhere in the entropy-coded data: DALI decodes it silently
    flip_bit(shards, label, member=1, at=0.99)  # another valid label
    log = tmp_path / "bad_samples.jsonl"
    damaged = epochs(make(shards, backend, log, threads=threads))
    for before, after in zip(clean, damaged, strict=True):
        bad = np.isin(before.sample_ids, [picture, label])
        expected = np.where(bad, before.sample_ids + 1, before.sample_ids)
        np.testing.assert_array_equal(after.sample_ids, expected)
        assert after.labels.tolist() == [shards.labels[i] for i in expected]
        assert torch.equal(after.images[~bad], before.images[~bad])
        np.testing.assert_array_equal(after.positions, before.positions)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(shards.keys[i] for i in (picture, label))
    for line in lines:
        assert line["rank"] == 2 and line["reason"].startswith("checksum differs")
        assert line["shard"] == place_of(shards, line["sample_id"])[0].name


@pytest.mark.parametrize("backend, threads", [("pil", 1), ("dali", 1)])
def test_a_vanished_shard_stops_the_run_at_the_limit(make_shards, tmp_path, backend, threads):
    shards = make_shards()
    gone = shards.manifest.shards[1].name
    (shards.directory / gone).unlink()
    log = tmp_path / "bad_samples.jsonl"
    loader = make(shards, backend, log, threads=threads)
    for _ in range(2):  # asked again it says so again, and does not wait for ever
        with pytest.raises(UserError, match=rf"^\d+ unus.*max_bad_samples=3.*rank 2.*{gone}"):
            [next(loader) for _ in range(8)]
    loader.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert 3 < len(lines) <= 3 + 4  # it is not read to its end to know that
    for line in lines:  # the index is still there and tells the keys
        assert line["key"] == shards.keys[line["sample_id"]]
        assert line["reason"].endswith(f"{gone}: No such file or directory")
    enough = epochs(make(shards, backend, limit=13, threads=threads), 4)
    ids = np.concatenate([batch.sample_ids for batch in enough])
    assert not np.isin(ids, np.arange(13, 26)).any() and (ids == 26).sum() > 1


@pytest.mark.parametrize("backend, threads", [("pil", 0), ("dali", 1)])
def test_a_run_without_a_single_good_sample_ends(make_shards, backend, threads):
    shards = make_shards()
    for shard in shards.manifest.shards:
        (shards.directory / shard.name).write_bytes(b"")
    with pytest.raises(UserError, match="60 unusable samples, and no good one is left"):
        epochs(make(shards, backend, limit=1000, threads=threads))


def test_a_file_replaced_under_its_reader_is_opened_again(shards, monkeypatch):
    """As network disks tell of it: the old descriptor is stale for ever."""
    reader, fine, stale = ShardReader(shards.directory, shards.manifest), os.pread, set()
    reader.read(0)
    opened = reader._open[0]
    stale |= {opened.tar, opened.lines}

    def pread(descriptor, *where):
        if descriptor in stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return fine(descriptor, *where)

    monkeypatch.setattr(os, "pread", pread)
    assert reader.read(1).image == shards.images[1]
    assert opened is not reader._open[0]


def evaluation(shards, backend):
    return eval_loader(
        EvalSetConfig(str(shards.directory)),
        DataConfig(backend=backend, input_size=32, threads=1),
        EvalConfig(batch=8),
        PLAIN,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_evaluation_refuses_damage(make_shards, backend):
    shards = make_shards()
    flip_bit(shards, 30)
    loader = evaluation(shards, backend)
    told = rf"cannot evaluate.*{shards.keys[30]} in shard-000002.tar.*verify {shards.directory} --r"
    with pytest.raises(UserError, match=told):
        list(loader)


def without_scan(image):
    """A file whose header cannot be read to its end."""
    frame = image.index(b"\xff\xda")
    return image[:frame] + b"\xff" * (len(image) - 2 - frame) + image[-2:]


def without_tables(image):
    """A file whose header is sound, so that only decoding it tells: this one stops DALI's graph."""
    return image.replace(b"\xff\xdb", b"\xff\xfe")  # the quantization tables, now a comment


def spoil(shards, sample, rotten):
    tar, fields = place_of(shards, sample)
    offset, size = int(fields[1]), int(fields[2])
    data = bytearray(tar.read_bytes())
    data[offset : offset + size] = rotten(bytes(data[offset : offset + size]))
    tar.write_bytes(bytes(data))


@pytest.mark.parametrize("rotten", [without_scan, without_tables])
@pytest.mark.parametrize("alone", [False, True])
def test_without_checksums_dali_still_survives_what_it_cannot_decode(
    make_shards, tmp_path, monkeypatch, rotten, alone
):
    """A file whole at both ends but rotten inside, to every decoder or to DALI alone."""
    shards = make_shards(checksums=False)
    loader = make(shards, "dali")
    victim = int(next(loader).sample_ids[5])
    loader.close()
    spoil(shards, victim, rotten)
    log = tmp_path / "bad.jsonl"
    if alone:
        monkeypatch.setattr(pil, "decode", lambda image: None)
    batch = epochs(make(shards, "dali", log), 1)[0]
    assert batch.sample_ids[5] == victim + 1
    assert batch.labels[5] == shards.labels[victim + 1]
    (line,) = map(json.loads, log.read_text().splitlines())
    assert line["key"] == shards.keys[victim]
    by_dali = alone and rotten is without_tables  # the other has no size, whoever decodes it
    assert by_dali == (line["reason"] == "DALI cannot decode it")


def test_what_dali_alone_cannot_decode_is_named_by_an_evaluation(make_shards, monkeypatch):
    shards = make_shards(checksums=False)
    spoil(shards, 30, without_tables)
    monkeypatch.setattr(pil, "decode", lambda image: None)
    loader = evaluation(shards, "dali")
    with pytest.raises(UserError, match=rf"{shards.keys[30]} in .* \(DALI cannot decode it\)"):
        list(loader)


@pytest.mark.parametrize("half, told", [(0, "neither a JPEG"), (1, "cut off")])
def test_without_checksums_the_ends_of_a_picture_are_looked_at(make_shards, half, told):
    """DALI fills what is missing with grey and says nothing."""
    shards = make_shards(checksums=False)
    tar, fields = place_of(shards, 20)
    offset, size = int(fields[1]), int(fields[2])
    with tar.open("r+b") as stream:
        stream.seek(offset + half * (size // 2))
        stream.write(bytes(size - size // 2))
    reader = ShardReader(shards.directory, shards.manifest)
    with pytest.raises(BadSample, match=told):
        reader.read(20)
    assert reader.read(21).image == shards.images[21]


def test_more_shards_than_may_be_open(shards, monkeypatch):
    monkeypatch.setattr("l2vit.data.shards._may_open", lambda shards: 2)
    reader = ShardReader(shards.directory, shards.manifest)
    for sample in np.random.default_rng(0).permutation(60).tolist():
        reader.announce(np.array([sample]))
        found = reader.read(sample)
        assert (found.image, found.label) == (shards.images[sample], shards.labels[sample])
        assert reader.key_of(sample) == shards.keys[sample] and len(reader._open) <= 2


@pytest.mark.parametrize(
    "soft, hard, shards, limit, opened",
    [
        (1024, 1 << 20, 1300, 3624, 1300),  # ImageNet-22k in shards of 1 GiB
        (1024, 4096, 2048, 4096, 1536),
        (1024, 1024, 1300, 1024, 256),
        (1 << 20, 1 << 20, 2048, 1 << 20, 2048),
    ],
)
def test_shards_leave_descriptors_to_others(monkeypatch, soft, hard, shards, limit, opened):
    """A process keeps 1,024 for all else (or half), however many shards it reads."""
    limits = {resource.RLIMIT_NOFILE: (soft, hard)}
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    assert _may_open(shards) == opened
    assert limits == {resource.RLIMIT_NOFILE: (limit, hard)}


def test_too_many_open_files_is_no_fault_of_the_sample(shards, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EMFILE, "Too many open files", "shard-000000.tar")

    reader = ShardReader(shards.directory, shards.manifest)
    monkeypatch.setattr("l2vit.data.shards.os.open", refuse)
    with pytest.raises(UserError, match=r"shard-000000.tar: Too many open files"):
        reader.read(0)


@pytest.mark.parametrize("name, text", [("idx", b"v1.2 13\n"), ("idx", b""), ("crc", b"\0\0\0\0")])
def test_a_broken_side_file_is_not_believed(make_shards, name, text):
    shards = make_shards()
    path = (shards.directory / shards.manifest.shards[0].name).with_suffix("." + name)
    path.write_bytes(text)
    loader = make(shards, "pil", limit=13, threads=0)
    for batch in epochs(loader):
        assert (batch.sample_ids >= 13).all()


def test_the_limit_counts_each_sample_once_over_all_ranks(tmp_path):
    from l2vit.data.bad_samples import BadRecord

    path = tmp_path / "bad_samples.jsonl"
    logs = [BadSampleLog(path, rank=rank, limit=3, directory=tmp_path) for rank in range(2)]
    bad = [BadRecord(i, f"k{i}", "shard-000000.tar", "gone") for i in range(5)]
    logs[0].record(bad[:2])
    logs[1].record(bad[1:3])
    logs[0].record(bad[:2])
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(UserError, match=rf"4 unus.*in {path}; .*verify {tmp_path} --repair`, move"):
        logs[1].record(bad[3:4])
    with path.open("a") as stream:
        stream.write('{"sample_id": 9')  # cut off by a crash
    with pytest.raises(UserError, match="5 unusable samples"):
        BadSampleLog(path, rank=0, limit=3, directory=tmp_path).record(bad[4:])
    assert json.loads(path.read_text().splitlines()[-1])["sample_id"] == 4


@pytest.mark.parametrize("backend, threads", [("pil", 0), ("pil", 1), ("dali", 1)])
def test_an_undamaged_label_out_of_range_stops_at_once(tmp_path, pictures, backend, threads):
    shards = write_shards(tmp_path / "s", pictures, [9] * len(pictures), per_shard=13, classes=10)
    manifest = dataclasses.replace(shards.manifest, classes=shards.manifest.classes[:9])
    manifest.save(shards.directory)
    with pytest.raises(UserError, match=r"^\S+ sample \d+: label 9 is out of range for the 9 cl"):
        epochs(make(dataclasses.replace(shards, manifest=manifest), backend, threads=threads))


def test_indexes_are_kept_within_their_memory(shards, monkeypatch):
    """13 samples take 52 bytes and as many again for checksums: two indexes of five fit."""
    monkeypatch.setattr("l2vit.data.shards._INDEX_BYTES", 250)
    reader = ShardReader(shards.directory, shards.manifest)
    for sample in np.random.default_rng(1).permutation(60).tolist():
        assert reader.read(sample).image == shards.images[sample]
        assert len(reader._indexes) <= 2
        assert reader._index_bytes == sum(index.bytes for index in reader._indexes.values())
