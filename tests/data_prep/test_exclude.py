"""The leakage guard, against a brute-force comparison and on real builds."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from raw_archives import encoded, jpeg, outer_tar, tar_bytes, zipped
from shard_contents import lines, manifest, samples

from data_prep.exclude import Guard, exact_matches, near_matches
from data_prep.records import RECORD


def photographs():
    """Eight different cut-outs of real photographs."""
    from sklearn.datasets import load_sample_images

    return [
        Image.fromarray(photo).crop((left, 20, left + 330, 270))
        for photo in load_sample_images().images
        for left in range(0, 300, 80)
    ]


@pytest.mark.parametrize("distance", [1, 2, 3, 5])
def test_near_matches_equal_brute_force(distance):
    rng = np.random.default_rng(distance)
    listed = rng.integers(0, 2**64, 300, dtype=np.uint64)
    hashes = rng.integers(0, 2**64, 4000, dtype=np.uint64)
    for row in range(0, 2000, 5):  # plant copies with 0 … 8 flipped bits
        mask = 0
        for bit in rng.choice(64, rng.integers(0, 9), replace=False):
            mask |= 1 << int(bit)
        hashes[row] = listed[rng.integers(300)] ^ np.uint64(mask)
    guard = Guard(frozenset(), frozenset(), listed, tuple(map(str, range(300))))
    rows, _, apart = near_matches(hashes, guard, distance)
    table = np.bitwise_count(hashes[:, None] ^ listed[None]).astype(int)
    expected = np.flatnonzero(table.min(axis=1) <= distance)
    assert rows.tolist() == expected.tolist() and len(rows) > 50
    assert apart.tolist() == table.min(axis=1)[expected].tolist()


def test_pictures_without_content_are_no_near_copies():
    guard = Guard(frozenset(), frozenset(), np.array([1], np.uint64), ("blank",))
    assert len(near_matches(np.array([1, 3], np.uint64), guard, 2)[0]) == 0


def test_exact_matches_compare_128_bits():
    shas = [hashlib.sha256(bytes([n])).hexdigest() for n in range(6)]
    twin = shas[0][:16] + shas[1][16:]  # same first half, another second half
    guard = Guard(frozenset([*shas[:3], twin]), frozenset(), np.zeros(0, np.uint64), ())
    records = np.zeros(7, RECORD)
    for row, sha in enumerate([*shas, shas[0][:16] + shas[2][16:]]):
        records["sha_high"][row], records["sha_low"][row] = int(sha[:16], 16), int(sha[16:32], 16)
    assert exact_matches(records, guard).tolist() == [True] * 3 + [False] * 4


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """Training archive in which images 0 to 3 of class 0 are also in the validation set."""
    root = tmp_path_factory.mktemp("leaky")
    photos = photographs()
    val = [encoded(photo, quality=90) for photo in photos[:4]]
    train = {
        "n97000000": [
            val[0],
            zipped(val[1]),
            encoded(photos[2].resize((250, 190)), quality=70),
            encoded(photos[3], "PNG"),
            *(encoded(photo, quality=90) for photo in photos[4:]),
        ],
        "n97000001": [jpeg(1), jpeg(2)],
    }
    (root / "train.tar").write_bytes(outer_tar(train))
    (root / "val").mkdir()
    for number, data in enumerate(val):
        (root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(data)
    named = [(f"ILSVRC2012_val_{number:08d}.JPEG", data) for number, data in enumerate(val)]
    (root / "val.tar").write_bytes(tar_bytes(named))
    hashes = [hashlib.sha256(data).hexdigest() for data in val]
    (root / "hashes.txt").write_text("# validation\n" + "\n".join(hashes) + "\n")
    (root / "keys.txt").write_text("n97000000_0\nn97000001_1.JPEG\n")
    words = ["build", "--dataset", "folder", "--source", str(root / "val_classes")]
    (root / "val_classes/c").mkdir(parents=True)
    for number, data in enumerate(val):
        (root / f"val_classes/c/{number}.jpg").write_bytes(data)
    from data_prep.__main__ import main

    words += ["--split", "val", "--out", str(root / "val_shards")]
    assert main([*words, "--workers", "1"]) == 0
    return root


CASES = [
    ("val", 0, {0: "exact", 1: "exact"}),
    ("hashes.txt", 0, {0: "exact", 1: "exact"}),
    ("val.tar", 3, {0: "exact", 1: "exact", 2: "near", 3: "near"}),
    ("val_shards", 3, {0: "exact", 1: "exact", 2: "near", 3: "near"}),
]


@pytest.mark.parametrize(("which", "distance", "expected"), CASES)
def test_listed_images_and_their_near_copies_stay_out(
    which, distance, expected, leaky, tmp_path, run
):
    out = tmp_path / "out"
    words = ("build", "--dataset", "imagenet22k", "--source", leaky / "train.tar", "--out", out)
    guard = ("--exclude", leaky / which, "--exclude-distance", distance)
    assert run(*words, *guard, "--workers", 1) == 0
    events = {e["key"]: e["reason"] for e in lines(out / "rejected.jsonl")}
    assert events == {f"n97000000_{n}": f"excluded-{kind}" for n, kind in expected.items()}
    assert len(samples(out)) == 10 - len(expected)
    report = manifest(out)["provenance"]["leakage_guard"]
    kinds = list(expected.values())
    assert report["listed"] == 4 and report["excluded-exact"] == kinds.count("exact")
    assert report.get("excluded-near", 0) == kinds.count("near")


def test_keys_and_names_can_be_listed(leaky, tmp_path, run):
    out = tmp_path / "out"
    words = ("build", "--dataset", "imagenet22k", "--source", leaky / "train.tar", "--out", out)
    assert run(*words, "--exclude", leaky / "keys.txt", "--workers", 1) == 0
    gone = {e["key"] for e in lines(out / "rejected.jsonl")}
    assert gone == {"n97000000_0", "n97000001_1"}


def test_an_empty_list_is_an_error(leaky, tmp_path, run, capsys):
    (tmp_path / "none").mkdir()
    words = ("build", "--dataset", "imagenet22k", "--source", leaky / "train.tar")
    for place in (tmp_path / "none", tmp_path / "nowhere"):
        assert run(*words, "--out", tmp_path / "o", "--exclude", place, "--workers", 1) == 1
        assert str(place) in capsys.readouterr().err
        import shutil

        shutil.rmtree(tmp_path / "o")
