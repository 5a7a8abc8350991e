"""The manifest: what it must notice, and what its hash depends on."""

import hashlib
import json
from dataclasses import replace

import pytest

from l2vit.data.manifest import Manifest, Shard, class_hash
from l2vit.errors import UserError

SHARDS = (
    Shard("shard-000000.tar", 3, 10, "a" * 64, "b" * 64),
    Shard("shard-000001.tar", 2, 20, "c" * 64, "d" * 64),
)
MANIFEST = Manifest("imagenet22k", "train", ("n1", "n2"), SHARDS, (4, 1), ("one", "two"))


def test_round_trip_and_numbers(tmp_path):
    MANIFEST.save(tmp_path)
    assert Manifest.load(tmp_path) == MANIFEST
    assert MANIFEST.samples == 5 and MANIFEST.first_ids.tolist() == [0, 3, 5]
    assert SHARDS[0].index_name == "shard-000000.idx"


def test_class_hash_is_sha256_of_the_ordered_lines():
    assert class_hash(["n1", "n2"]) == hashlib.sha256(b"n1\nn2\n").hexdigest()
    assert class_hash(["n2", "n1"]) != class_hash(["n1", "n2"])


def test_the_hash_covers_what_a_loader_sees_and_no_more():
    same = replace(MANIFEST, provenance={"source": "elsewhere"}, dataset="folder")
    assert same.hash == MANIFEST.hash
    for other in (
        replace(MANIFEST, classes=("n2", "n1")),
        replace(MANIFEST, shards=SHARDS[::-1]),
        replace(MANIFEST, shards=(replace(SHARDS[0], sha256="e" * 64), SHARDS[1])),
    ):
        assert other.hash != MANIFEST.hash


@pytest.mark.parametrize(
    ("key", "value"),
    [("samples", 6), ("class_hash", "0" * 64), ("classes", ["n1", "n3"]), ("format", 2)],
)
def test_a_manifest_that_contradicts_itself_is_refused(key, value, tmp_path):
    MANIFEST.save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


def test_missing_and_resized_shards_are_named(tmp_path):
    with pytest.raises(UserError, match="not a finished shard directory"):
        Manifest.load(tmp_path)
    for shard in SHARDS:
        (tmp_path / shard.name).write_bytes(bytes(shard.bytes))
        (tmp_path / shard.index_name).write_text("")
    MANIFEST.require_shards(tmp_path)
    (tmp_path / SHARDS[1].name).write_bytes(bytes(7))
    with pytest.raises(UserError, match=r"shard-000001\.tar has 7 bytes"):
        MANIFEST.require_shards(tmp_path)
    (tmp_path / SHARDS[0].index_name).unlink()
    with pytest.raises(UserError, match=r"missing shard file .*shard-000000\.idx"):
        MANIFEST.require_shards(tmp_path)
