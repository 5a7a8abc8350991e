"""Shards through a cache: the same batches as from a disk, whatever the server and the cache do."""

from __future__ import annotations

import errno
import functools
import http.server
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from l2vit.data import storage
from l2vit.data.cache import RangeCache
from l2vit.data.config import AugmentConfig, DataConfig, EvalConfig, EvalSetConfig, SubsetConfig
from l2vit.data.loader import eval_loader, open_reader, train_loader
from l2vit.data.manifest import Manifest, Shard
from l2vit.data.order import SampleOrder, Split
from l2vit.data.shard_cache import fitting_window
from l2vit.data.workers import WorkerBatches
from l2vit.errors import ConfigError, UserError

CPU = torch.device("cpu")
SMALL = 1e-4  # GiB: less than half of the shards' 270 kB


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges of a directory, and fails as ``fail(path, count)`` says."""

    requests: list[str]
    fail = staticmethod(lambda path, count: "")

    def do_GET(self) -> None:
        self.requests.append(self.path)
        failure = self.fail(self.path, self.requests.count(self.path))
        path = Path(self.translate_path(self.path))
        if failure == "stall":
            time.sleep(600)
        if failure in ("404", "503", "403") or not path.is_file():
            return self.send_error(int(failure or 404))
        data, status = path.read_bytes(), 200
        found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found:
            data, status = data[int(found[1]) : int(found[2] or len(data)) + 1], 206
        if failure == "damage":
            data = bytes(len(data))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if failure == "cut" else data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(shards):
    handler = type("Handler", (Server,), {"requests": []})
    made = functools.partial(handler, directory=str(shards.directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), made) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        handler.address = f"http://127.0.0.1:{running.server_port}"
        yield handler
        running.shutdown()


def load(where, cache="", *, backend="pil", threads=0, seen=0, steps=8, gib=1.0, log=None, **data):
    settings = DataConfig(
        train=str(where),
        backend=backend,
        input_size=32,
        threads=threads,
        chunk=16,
        cache_dir=str(cache),
        cache_gib=gib,
        **data,
    )
    loader = train_loader(
        settings,
        AugmentConfig(),
        manifest=Manifest.of_training(settings),
        split=Split(8, 2, 1),
        rank=0,
        seed=3,
        device=CPU,
        images_seen=seen,
        bad_samples_log=log,
    )
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def equal(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.sample_ids, theirs.sample_ids)
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)


def size_of(cache):
    return sum(p.stat().st_size for p in cache.glob("*/**/*") if p.is_file())


@pytest.mark.parametrize(
    "backend, threads, gib", [("pil", 0, 1.0), ("pil", 2, SMALL), ("dali", 1, SMALL)]
)
def test_a_server_gives_what_a_disk_gives(shards, server, tmp_path, backend, threads, gib):
    """Over epochs, resumed, by both backends, with a cache smaller than the data."""
    local = load(shards.directory, backend=backend, threads=1, steps=12)
    cache = tmp_path / "cache"
    options = {"backend": backend, "threads": threads, "gib": gib}
    equal(load(server.address, cache, steps=12, **options), local)
    equal(load(server.address, cache, seen=32, steps=8, **options), local[4:])
    assert size_of(cache) <= gib * 2**30


def test_a_warm_cache_asks_for_the_manifest_alone(shards, server, tmp_path):
    load(server.address, tmp_path, steps=20)
    server.requests.clear()
    equal(load(server.address, tmp_path, steps=20), load(shards.directory, steps=20))
    assert set(server.requests) == {"/manifest.json"}


def test_shards_are_staged_from_a_slow_disk(shards, tmp_path):
    equal(load(shards.directory, tmp_path, steps=20), load(shards.directory, steps=20))
    for path in tmp_path.glob("*/shard-*/*"):
        first, count = map(int, path.name.split("-"))
        tar = (shards.directory / f"{path.parent.name}.tar").read_bytes()
        assert path.read_bytes() in tar and count == 4 and first % 4 == 0


def test_a_cache_too_small_for_two_batches_is_told(shards, tmp_path, monkeypatch):
    """The number in the warning is one that no longer warns."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.warns(UserWarning, match=r"data.cache_gib: 1e-05 .* at least \S+") as caught:
        load(shards.directory, tmp_path, gib=1e-5, steps=1)
    enough = float(re.search(r"at least ([\d.e+-]+)", str(caught[0].message))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(shards.directory, tmp_path, gib=1.01 * enough, steps=1)


def test_a_small_cache_fetches_a_batch_by_a_request_a_shard(shards, server, tmp_path):
    """Half the data: what was announced is there when it is read, and no sample comes twice."""
    size = sum(shard.bytes for shard in shards.manifest.shards)
    data = DataConfig(chunk=16, cache_dir=str(tmp_path), cache_gib=size / 2 / 2**30)
    reader = open_reader(data, server.address, shards.manifest, Split(8, 1, 1))
    local = open_reader(DataConfig(), shards.directory, shards.manifest)
    order = SampleOrder("a", [13] * 4 + [8], seed=0, chunk=16, global_batch=8)
    for batch in order.epoch_ids(0).reshape(-1, 8):
        server.requests.clear()
        reader.announce(batch)
        places = [reader.locate(sample) for sample in batch.tolist()]
        for shard, number in places:
            while not list(tmp_path.glob(f"*/shard-{shard:06d}/{number}-1")):
                time.sleep(0.01)
        fetched = [path for path in server.requests if path.endswith(".tar")]
        assert 1 <= len(fetched) == len(set(fetched)) <= len(set(dict(places)))
        server.requests.clear()
        for sample in batch.tolist():
            assert reader.read(sample) == local.read(sample)
        assert not server.requests and size_of(tmp_path) <= size / 2


def test_a_cache_of_a_tenth_of_a_large_set_keeps_large_units(tmp_path):
    """ImageNet-22k on 8 nodes: 512 places a node read 64 samples at a time, as with all of it."""
    hashed, samples = "0" * 64, 14_200_000
    shard = Shard("s-000000.tar", samples, 1_300_000_000_000, hashed, hashed)
    manifest = Manifest("d", "train", ("a",), (shard,), (samples,))
    split = Split(512, 1, 8)
    assert fitting_window(DataConfig(cache_gib=2000), manifest, split)[:2] == (64, 32)
    assert fitting_window(DataConfig(cache_gib=120), manifest, split)[:2] == (64, 32)
    assert fitting_window(DataConfig(cache_gib=4), manifest, split)[0] < 32


def test_subsets_and_evaluation_read_an_address(shards, server, tmp_path):
    chosen = tmp_path / "classes.txt"
    chosen.write_text("\n".join(f"n{i:08d}" for i in range(8)))
    without = tmp_path / "without.txt"
    without.write_text(shards.keys[7])
    subset = SubsetConfig(classes=str(chosen), exclude=str(without))
    found = load(server.address, tmp_path / "cache", subset=subset)
    equal(found, load(shards.directory, subset=subset))
    results = []
    for where, cache in ((server.address, tmp_path / "cache"), (shards.directory, "")):
        data = DataConfig(backend="pil", input_size=32, threads=0, cache_dir=str(cache))
        loader = eval_loader(
            EvalSetConfig(str(where)), data, EvalConfig(), AugmentConfig(), device=CPU
        )
        results.append(list(loader))
    equal(*results)


@pytest.mark.parametrize("failure", ["503", "cut", "stall", "damage"])
def test_a_failure_that_passes_is_not_seen(shards, server, tmp_path, monkeypatch, failure):
    """Each file fails when it is first asked for."""
    monkeypatch.setattr(storage, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(storage, "SILENT_SECONDS", 8.0)
    calm = ("/manifest.json", ".crc") if failure == "damage" else ()
    slow = failure == "stall"

    def fail(path, count):
        if path.endswith(calm) and calm:
            return ""
        return failure if count == 1 and (not slow or path.endswith("0.tar")) else ""

    server.fail = staticmethod(fail)
    equal(load(server.address, tmp_path, steps=6), load(shards.directory, steps=6))


@pytest.mark.parametrize("failure", ["503", "stall"])
def test_a_dead_server_is_named(server, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(storage, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(storage, "SILENT_SECONDS", 1.5)
    server.fail = staticmethod(lambda path, count: failure if path.endswith(".tar") else "")
    with pytest.raises(
        UserError, match=rf"cannot read {server.address}/shard-00000\d.tar: nothing"
    ):
        load(server.address, tmp_path)


def test_nobody_listens_at_the_address(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(storage, "STALL_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"cannot read http://127.0.0.1:9/s/manifest.json: nothing"):
        load("http://127.0.0.1:9/s", tmp_path)
    assert storage.SILENT_SECONDS < 60


def test_the_limits_leave_room_within_a_minute():
    """The last request may begin just before the limit and last a stall's time."""
    assert storage.SILENT_SECONDS + storage.STALL_SECONDS < 60


def test_a_missing_shard_is_bad_samples_as_on_a_disk(server, tmp_path):
    server.fail = staticmethod(lambda path, count: "404" if path.endswith("01.tar") else "")
    log = tmp_path / "bad.jsonl"
    batches = load(server.address, tmp_path / "cache", log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines and {line["shard"] for line in lines} == {"shard-000001.tar"}
    assert all("No such file" in line["reason"] and "#" not in line["key"] for line in lines)
    assert not {i for b in batches for i in b.sample_ids.tolist()} & set(range(13, 26))


def test_an_index_that_is_not_the_manifests_is_refused(make_shards, tmp_path):
    shards = make_shards()
    index = next(shards.directory.glob("*.idx"))
    index.write_text(index.read_text().replace(" 1", " 2", 1))
    with pytest.raises(UserError, match=rf"{index.name} is not the index that the manifest names"):
        load(shards.directory, tmp_path / "cache", steps=20)


def test_a_damaged_range_in_the_cache_is_fetched_again(shards, tmp_path):
    expected = load(shards.directory, steps=20)
    load(shards.directory, tmp_path, steps=20)
    for path in tmp_path.glob("*/shard-*/*"):
        path.write_bytes(bytes(path.stat().st_size))
    equal(load(shards.directory, tmp_path, steps=20), expected)


def test_an_address_needs_a_cache(server):
    with pytest.raises(ConfigError, match=rf"data.cache_dir is required to read {server.address}"):
        load(server.address)


def test_a_scheme_whose_package_is_missing_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"cannot read gs://bucket/train: .*install gcsfs"):
        load("gs://bucket/train", tmp_path)


# -- the cache itself


def test_a_disk_that_is_truly_full_is_told(tmp_path):
    """Others fill a small file system: the cache makes do with less, then the error names it."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "t", tmp_path]).returncode:
        pytest.skip("only root may mount a file system")
    try:
        cache = RangeCache(tmp_path / "cache", 10 << 20)
        for number in range(4):
            assert cache.read(f"a/{number}", lambda: bytes(200_000)) == bytes(200_000)
        (tmp_path / "of-others").write_bytes(bytes(150_000))
        assert cache.read("a/4", lambda: bytes(200_000)) == bytes(200_000)
        with pytest.raises(UserError, match=rf"no space left for 2,000,000 .* in {tmp_path}"):
            cache.read("a/5", lambda: bytes(2_000_000))
        assert not list(tmp_path.rglob("*.part-*"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_least_recently_used_goes(tmp_path):
    cache = RangeCache(tmp_path, 1000)
    for i in range(9):
        cache.read(f"a/{i}", lambda: bytes(100))
    for i in (0, 2):
        time.sleep(0.01)
        assert cache.read(f"a/{i}", lambda: pytest.fail("it is there"), 40, 10) == bytes(10)
    cache.read("a/9", lambda: bytes(200))
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"0", "2", "9"} <= left and "1" not in left and size_of(tmp_path) <= 1000


def test_what_was_read_to_its_end_goes_first(tmp_path):
    cache = RangeCache(tmp_path, 1000)
    for i in range(9):
        cache.read(f"a/{i}", lambda: bytes(100))
    cache.read("a/8", lambda: pytest.fail("it is there"), last=True)
    cache.read("a/9", lambda: bytes(200))
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert "8" not in left and {"7", "9"} <= left


PROCESS = """
import os, sys, time
from pathlib import Path
from l2vit.data.cache import RangeCache
root, log = Path(sys.argv[1]), Path(sys.argv[2])
cache = RangeCache(root, 40_000)
def fetch(i):
    with log.open("a") as stream:
        stream.write(f"{i}\\n")
    return bytes([i]) * 1000
for turn in range(int(sys.argv[3])):
    for i in range(30):
        assert cache.read(f"x/{i}", lambda: fetch(i)) == bytes([i]) * 1000
"""


def test_processes_fetch_a_range_once(tmp_path):
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "c"), str(tmp_path / "log"), "3"]
    runs = [subprocess.Popen(command) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(30))


def test_a_killed_process_leaves_nothing_half_written(tmp_path):
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "c"), str(tmp_path / "log"), "100000"]
    for pause in (0.02, 0.1):
        run = subprocess.Popen(command)
        while not (tmp_path / "log").exists():
            time.sleep(0.01)
        time.sleep(pause)
        run.send_signal(signal.SIGKILL)
        run.wait()
    for path in (tmp_path / "c" / "x").glob("[0-9]*"):
        assert ".part-" in path.name or path.read_bytes() == bytes([int(path.name)]) * 1000
    command[-1] = "1"
    assert subprocess.run(command).returncode == 0


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    cache = RangeCache(tmp_path, 10_000)
    cache.read("a/1", lambda: bytes(1000))

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"data.cache_dir: no space left .* in {tmp_path}"):
        cache.read("a/2", lambda: bytes(1000))
    monkeypatch.undo()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write"):
        RangeCache(blocked / "under", 1)


class WhatArrived(torch.utils.data.Dataset):
    """Answers with what a worker process holds."""

    def __init__(self, reader, order):
        self.reader, self.order = reader, order

    def __getitem__(self, number):
        shard = self.reader.locate(self.order.samples)[0]
        cached = self.reader._cache._index_hashes.values[shard].tobytes()
        return self.order.fingerprint, self.reader.shard_name(10 * shard), cached


@pytest.mark.parametrize("shards", [2_000, 40_000])
def test_workers_are_sent_references(shards, tmp_path, monkeypatch):
    """Real workers; the same few kilobytes for 40,000 shards and a subset of their samples."""
    hashes = [f"{number:064x}" for number in range(shards)]
    table = tuple(Shard(f"s-{i:06d}.tar", 10, 10, h, h) for i, h in enumerate(hashes))
    manifest = Manifest("d", "train", ("a",), table, (10 * shards,))
    data = DataConfig(train=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    subset = np.arange(0, 10 * shards, 2, dtype=np.int32)
    counts = [10] * shards
    order = SampleOrder("a", counts, seed=0, chunk=8, global_batch=8, subset=subset)
    sent, dump = [], multiprocessing.reduction.dump

    def recorded(what, stream, *more):
        before = stream.tell()
        dump(what, stream, *more)
        sent.append(stream.tell() - before)

    monkeypatch.setattr(multiprocessing.reduction, "dump", recorded)
    arrived = WhatArrived(open_reader(data, data.train, manifest), order)
    batches = WorkerBatches(arrived, workers=2, prefetch=1, pin=False, count=4)
    middle = shards // 2
    expected = (order.fingerprint, f"s-{middle:06d}.tar", bytes.fromhex(hashes[middle]))
    assert list(batches) == [expected] * 4
    assert len(sent) == 4 and sum(sent) < 2 * 8192  # two messages a worker


def test_an_opened_reader_is_pickled_without_its_files(shards, tmp_path):
    data = DataConfig(train=str(shards.directory), cache_dir=str(tmp_path))
    reader = open_reader(data, data.train, shards.manifest)
    reader.announce(np.arange(60))
    reader.read(3)
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(3) == reader.read(3) and len(pickle.dumps(reader)) < 3000
