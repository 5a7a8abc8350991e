"""A run whose shards, and copies of whose checkpoints, lie in an S3-like store (moto's server)."""

import shutil
import socket
import subprocess
import sys
import time

import boto3
import pytest
from botocore.exceptions import BotoCoreError
from forked_ranks import Ranks
from small_runs import losses, settings, train
from test_resumed_runs import all_tensors, assert_same, finish

from l2vit.train import checkpoint

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@pytest.fixture
def bucket(shards, tmp_path, monkeypatch):
    """``s3://runs``, which holds the shards beneath ``shards/``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    for name, value in {**KEYS, "FSSPEC_S3_ENDPOINT_URL": address}.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / "moto.log").open("w") as log:
        command = [sys.executable, "-m", "moto.server", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
    while True:
        try:
            client.create_bucket(Bucket="runs")
            break
        except BotoCoreError:
            assert server.poll() is None, (tmp_path / "moto.log").read_text()
            time.sleep(0.1)
    for path in shards.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "runs", f"shards/{path.relative_to(shards)}")
    yield "s3://runs"
    server.terminate()
    server.wait()


def test_a_store_gives_the_run_a_disk_gives(bucket, shards, tmp_path):
    """Killed and continued on two ranks, with a cache that holds a third of the shards."""
    local = tmp_path / "local"
    finish(settings(shards, local), 2, tmp_path)

    cache, run = tmp_path / "cache", tmp_path / "remote"
    size = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file())
    changes = {
        "data__train": f"{bucket}/shards/train",
        "data__val": f"{bucket}/shards/val",
        "data__cache_dir": str(cache),
        "data__cache_gib": size / 3 / 2**30,
        "checkpoint__mirror": f"{bucket}/copies",
    }
    path = settings(shards, run, **changes)
    ranks = Ranks(train, 2, path, directory=tmp_path, raw=True)
    while not checkpoint.complete_steps(run):
        assert ranks.processes[0].is_alive(), ranks.log(0)[-3000:]
        time.sleep(0.01)
    ranks.kill_all()
    finish(path, 2, tmp_path)
    assert_same(run, all_tensors(local))
    assert losses(run) == losses(local)
    assert sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) <= size / 2

    # The disk is lost: the run goes on from the copy, to twice its length.
    shutil.rmtree(run)
    shutil.rmtree(cache)
    longer = {"schedule__length": "32 steps", "schedule__warmup": "4 steps"}
    path = settings(shards, run, **changes, **longer)
    ranks = finish(path, 2, tmp_path)
    assert f"fetched step 24 from {bucket}/copies" in ranks.log(0)
    assert min(losses(run)) == 25 and max(losses(run)) == 32
    assert checkpoint.complete_steps(run)[-1] == 32
