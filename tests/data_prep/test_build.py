"""What a build writes, whatever the source looks like and however many workers wrote it."""

import itertools
import json
import tarfile

import pytest
from raw_archives import class_members, jpeg, outer_tar, small_release, tar_bytes, zipped
from shard_contents import lines, manifest, samples, tree

from data_prep.options import Options
from data_prep.plan import shard_bounds
from l2vit.data.manifest import Manifest

CLASSES = small_release()
EXPECTED = {
    (f"{wnid}_{number}", data, label)
    for label, wnid in enumerate(CLASSES)
    for number, data in enumerate(CLASSES[wnid])
}


def make_sources(kind, root):
    root.mkdir()
    if kind == "outer":
        (root / "fall11_whole.tar").write_bytes(outer_tar(CLASSES))
        return [root / "fall11_whole.tar"]
    if kind == "gzip":
        (root / "winter21_whole.tar.gz").write_bytes(zipped(outer_tar(CLASSES)))
        return [root / "winter21_whole.tar.gz"]
    if kind == "nested-directory":
        members = [
            (f"winter21_whole/{wnid}.tar", tar_bytes(class_members(wnid, images)))
            for wnid, images in reversed(CLASSES.items())
        ]
        (root / "w.tar").write_bytes(tar_bytes(members))
        return [root]
    if kind == "class-tars":
        for wnid, images in CLASSES.items():
            (root / f"{wnid}.tar").write_bytes(tar_bytes(class_members(wnid, images)))
        return [root]
    if kind == "class-tar-files":
        sources = make_sources("class-tars", root / "tars")
        return sorted(sources[0].iterdir(), reverse=True)
    if kind == "gzip-class-tars":
        for wnid, images in CLASSES.items():
            data = zipped(tar_bytes(class_members(wnid, images)))
            (root / f"{wnid}.tar.gz").write_bytes(data)
        return [root]
    for wnid, images in CLASSES.items():
        (root / wnid).mkdir()
        for name, data in class_members(wnid, images):
            (root / wnid / name).write_bytes(data)
        (root / wnid / "notes.txt").write_text("not an image")
    return [root]


KINDS = [
    "outer",
    "gzip",
    "nested-directory",
    "class-tars",
    "class-tar-files",
    "gzip-class-tars",
    "folders",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, release):
    from data_prep.__main__ import main

    out = tmp_path_factory.mktemp("reference") / "out"
    words = ["build", "--dataset", "imagenet22k", "--source", str(release), "--out", str(out)]
    assert main([*words, "--workers", "1", "--shard-samples", "16"]) == 0
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_shards(kind, tmp_path, run, reference):
    sources = make_sources(kind, tmp_path / "raw")
    dataset = "folder" if kind == "folders" else "imagenet22k"
    out = tmp_path / "out"
    words = ("build", "--dataset", dataset, "--source", *sources, "--out", out)
    assert run(*words, "--workers", 2, "--shard-samples", 16, "--split", "train") == 0
    shards = {name: sha for name, sha in tree(out).items() if name.startswith("shard-")}
    expected = {name: sha for name, sha in tree(reference).items() if name.startswith("shard-")}
    assert shards == expected
    assert Manifest.load(out).hash == Manifest.load(reference).hash


def test_all_images_arrive_untouched_with_their_labels(reference):
    found = samples(reference)
    assert set(found) == EXPECTED and len(found) == len(EXPECTED) == 60
    about = manifest(reference)
    assert about["classes"] == sorted(CLASSES) and about["class_counts"] == [20, 20, 20]
    assert about["split"] == "train" and about["samples"] == 60
    assert about["provenance"]["release"] == "custom"
    assert lines(reference / "rejected.jsonl") == lines(reference / "repaired.jsonl") == []


def test_the_number_of_workers_changes_no_byte(tmp_path, run, release, reference):
    words = ("build", "--dataset", "imagenet22k", "--source", release, "--shard-samples", 16)
    assert run(*words, "--out", tmp_path / "three", "--workers", 3) == 0
    assert tree(tmp_path / "three") == tree(reference)


@pytest.mark.parametrize("kind", ["outer", "folders"])
def test_gathering_first_changes_no_byte(kind, tmp_path, run, reference, monkeypatch):
    import data_prep.gather

    monkeypatch.setattr(data_prep.gather, "_TASK_BYTES", 1)  # a task a class
    sources = make_sources(kind, tmp_path / "raw")
    words = ("build", "--dataset", "imagenet22k", "--source", *sources, "--out", tmp_path / "o")
    assert run(*words, "--workers", 2, "--shard-samples", 16, "--gather") == 0
    found = {name: sha for name, sha in tree(tmp_path / "o").items() if "shard-" in name}
    assert found == {name: sha for name, sha in tree(reference).items() if "shard-" in name}
    assert not list((tmp_path / "o").rglob("gathered"))


def test_the_shuffle_is_global_and_seeded(tmp_path, run, release, reference):
    labels = [label for _, _, label in samples(reference)]
    for start in range(0, 48, 16):
        assert len(set(labels[start : start + 16])) == 3  # every shard sees every class
    words = ("build", "--dataset", "imagenet22k", "--source", release, "--out", tmp_path / "out")
    assert run(*words, "--seed", 1, "--workers", 1) == 0
    other = samples(tmp_path / "out")
    assert set(other) == EXPECTED
    assert [s[0] for s in other] != [s[0] for s in samples(reference)]


def test_the_index_is_what_wds2idx_would_write(reference):
    for index in reference.glob("*.idx"):
        rows = []
        with tarfile.open(index.with_suffix(".tar")) as archive:
            for image, label in zip(*[iter(archive.getmembers())] * 2, strict=True):
                rows.append(
                    f"jpg {image.offset_data} {image.size} {image.name}"
                    f" cls {label.offset_data} {label.size} {label.name}"
                )
        assert index.read_text() == f"v1.2 {len(rows)}\n" + "\n".join(rows) + "\n"


@pytest.mark.parametrize("rule", [("--val-fraction", 0.3), ("--val-per-class", 5)])
def test_parts_are_disjoint_and_the_same_built_together_or_apart(rule, tmp_path, run, release):
    words = ("build", "--dataset", "imagenet22k", "--source", release, *rule, "--workers", 1)
    for split, out in [("both", "b"), ("train", "t"), ("val", "v")]:
        assert run(*words, "--split", split, "--out", tmp_path / out) == 0
    train, val = samples(tmp_path / "b/train"), samples(tmp_path / "b/val")
    assert set(train) | set(val) == EXPECTED and not set(train) & set(val)
    assert samples(tmp_path / "t") == train and samples(tmp_path / "v") == val
    assert manifest(tmp_path / "b/val")["split"] == "val"
    if rule[0] == "--val-per-class":
        assert manifest(tmp_path / "b/val")["class_counts"] == [5, 5, 5]
    else:
        assert 8 <= len(val) <= 28
    recorded = {manifest(tmp_path / d)["provenance"]["split_rule"] for d in ("b/train", "v")}
    assert len(recorded) == 1 and str(rule[1]) in recorded.pop()


def test_the_first_of_each_class_as_validation(tmp_path, run, release):
    words = ("build", "--dataset", "imagenet22k", "--source", release, "--workers", 1)
    assert run(*words, "--split", "val", "--val-first-per-class", 3, "--out", tmp_path / "v") == 0
    found = {key for key, _, _ in samples(tmp_path / "v")}
    assert found == {f"{wnid}_{number}" for wnid in CLASSES for number in range(3)}


def test_a_part_without_a_rule_is_the_whole_source(tmp_path, run, release):
    words = ("build", "--dataset", "imagenet22k", "--source", release, "--workers", 1)
    assert run(*words, "--split", "val", "--out", tmp_path / "v") == 0
    assert manifest(tmp_path / "v")["split"] == "val" and len(samples(tmp_path / "v")) == 60
    assert run(*words, "--split", "both", "--out", tmp_path / "b") == 2


def test_shards_respect_their_limits():
    import numpy as np

    sizes = np.random.default_rng(0).integers(1000, 90_000, 500)
    options = Options("folder", (), out=None, shard_bytes=1 << 20, shard_samples=30)
    bounds = shard_bounds(sizes, options)
    assert bounds[0] == 0 and bounds[-1] == 500
    for start, stop in itertools.pairwise(bounds):
        tar = 1024 + sum(512 + -(-int(s) // 512) * 512 + 1024 for s in sizes[start:stop])
        assert tar <= 1 << 20 and 0 < stop - start <= 30


def test_shard_bytes_hold_on_disk(tmp_path, run, release):
    words = ("build", "--dataset", "imagenet22k", "--source", release, "--out", tmp_path / "out")
    assert run(*words, "--shard-bytes", "64K", "--workers", 1) == 0
    sizes = [path.stat().st_size for path in tmp_path.glob("out/*.tar")]
    assert len(sizes) > 2 and max(sizes) <= 1 << 16


def test_duplicates_within_and_across_classes(tmp_path, run):
    same, shared = jpeg(500), jpeg(501)
    classes = {
        "n91000000": [same, jpeg(502), same, same, shared],
        "n91000001": [shared, jpeg(503), zipped(shared)],
    }
    (tmp_path / "raw.tar").write_bytes(outer_tar(classes))
    words = ("build", "--dataset", "imagenet22k", "--source", tmp_path / "raw.tar")
    assert run(*words, "--out", tmp_path / "out", "--workers", 1) == 0
    kept = {key for key, _, _ in samples(tmp_path / "out")}
    assert kept == {f"n91000000_{n}" for n in (0, 1, 4)} | {f"n91000001_{n}" for n in (0, 1)}
    events = lines(tmp_path / "out/rejected.jsonl")
    dropped = [(e["member"], e["detail"]) for e in events if e["reason"] == "duplicate"]
    assert dropped == [
        ("n91000000_2.JPEG", "same bytes as n91000000_0"),
        ("n91000000_3.JPEG", "same bytes as n91000000_0"),
        ("n91000001_2.JPEG", "same bytes as n91000001_0"),
    ]
    across = [e for e in events if e["reason"] == "duplicate-across-classes"]
    assert len(across) == 1 and across[0]["key"] == "n91000001_0"
    assert manifest(tmp_path / "out")["provenance"]["cross_class_duplicates"] == 1


def test_what_was_rejected_and_repaired_is_written_down(tmp_path, run):
    from raw_archives import encoded, picture

    good, half = jpeg(600), jpeg(601)
    classes = {
        "n92000000": [good, half[: len(half) // 2], b"", b"<html>no</html>", zipped(jpeg(602))],
        "n92000001": [encoded(picture(603), "PNG"), jpeg(604, 20, 20), jpeg(605)],
    }
    (tmp_path / "raw.tar").write_bytes(outer_tar(classes))
    words = ("build", "--dataset", "imagenet22k", "--source", tmp_path / "raw.tar")
    assert run(*words, "--out", tmp_path / "out", "--workers", 1) == 0
    rejected = lines(tmp_path / "out/rejected.jsonl")
    assert [(e["member"], e["reason"]) for e in rejected] == [
        ("n92000000_1.JPEG", "truncated"),
        ("n92000000_2.JPEG", "empty"),
        ("n92000000_3.JPEG", "html"),
        ("n92000001_1.JPEG", "too-small"),
    ]
    import hashlib

    assert rejected[0]["sha256"] == hashlib.sha256(half[: len(half) // 2]).hexdigest()
    assert rejected[0]["source"].endswith("raw.tar/n92000000.tar")
    repaired = lines(tmp_path / "out/repaired.jsonl")
    assert [(e["key"], e["reason"]) for e in repaired] == [
        ("n92000000_4", "gzip"),
        ("n92000001_0", "png"),
    ]
    written = {key: data for key, data, _ in samples(tmp_path / "out")}
    for event in repaired:
        assert hashlib.sha256(written[event["key"]]).hexdigest() == event["sha256_out"]
    assert written["n92000000_4"] == jpeg(602)
    reasons = manifest(tmp_path / "out")["provenance"]["reasons"]
    assert reasons["rejected"] == {"empty": 1, "html": 1, "too-small": 1, "truncated": 1}


def test_class_lists(tmp_path, run, release, capsys):
    words = ("build", "--dataset", "imagenet22k", "--source", release, "--workers", 1)
    names = tmp_path / "classes.txt"
    names.write_text("n90000002\nn99999999\nn90000000\n")
    assert run(*words, "--out", tmp_path / "list", "--classes", names) == 0
    about = manifest(tmp_path / "list")
    assert about["classes"] == ["n90000002", "n99999999", "n90000000"]
    assert about["class_counts"] == [20, 0, 20]
    assert {(k, lab) for k, _, lab in samples(tmp_path / "list")} == {
        (f"{wnid}_{n}", lab)
        for wnid, lab in [("n90000002", 0), ("n90000000", 2)]
        for n in range(20)
    }
    assert run(*words, "--out", tmp_path / "dir", "--classes", tmp_path / "list") == 0
    assert manifest(tmp_path / "dir")["class_hash"] == about["class_hash"]
    assert run(*words, "--out", tmp_path / "none", "--classes", "imagenet1k") == 1
    assert "none of the 3 classes" in capsys.readouterr().err


def test_small_classes_can_be_dropped(tmp_path, run):
    classes = {"n93000000": [jpeg(700)], "n93000001": [jpeg(710 + i) for i in range(4)]}
    (tmp_path / "raw.tar").write_bytes(outer_tar(classes))
    words = ("build", "--dataset", "imagenet22k", "--source", tmp_path / "raw.tar")
    assert run(*words, "--out", tmp_path / "o", "--min-class-images", 2, "--workers", 1) == 0
    assert manifest(tmp_path / "o")["classes"] == ["n93000001"]
    assert {label for _, _, label in samples(tmp_path / "o")} == {0}


def test_folder_keys_are_unique_and_harmless(tmp_path, run):
    root = tmp_path / "raw"
    for place, seed in [
        ("cat/a.b.jpg", 1),
        ("cat/a_b.jpg", 2),
        ("cat/sub/x.png", 3),
        ("my dog/x.jpg", 4),
        ("my dog/x.jpeg", 5),
        ("my dog/ü.jpg", 6),
    ]:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(jpeg(seed))
    words = ("build", "--dataset", "folder", "--source", root, "--out", tmp_path / "out")
    assert run(*words, "--workers", 1, "--split", "train") == 0
    keys = [key for key, _, _ in samples(tmp_path / "out")]
    assert len(set(keys)) == 6
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for key in keys)
    assert manifest(tmp_path / "out")["classes"] == ["cat", "my dog"]


def test_info_json_is_what_timm_reads(reference):
    info = json.loads((reference / "_info.json").read_text())["splits"]["train"]
    assert info["num_samples"] == 60 and info["shard_lengths"] == [16, 16, 16, 12]
    assert info["filenames"] == [f"shard-{n:06d}.tar" for n in range(4)]
