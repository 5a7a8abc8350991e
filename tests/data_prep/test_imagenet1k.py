"""ILSVRC2012 as it comes: train tar of tars, flat val tar, labels in the devkit."""

import io
import tarfile

import numpy as np
import pytest
from raw_archives import jpeg, outer_tar, tar_bytes
from shard_contents import manifest, samples

WNIDS = ["n98000000", "n98000001", "n98000002"]
# the devkit numbers classes in its own order, inner nodes after the leaves
IDS = {2: "n98000000", 3: "n98000001", 1: "n98000002", 4: "n98999999"}
TRUTH = [3, 1, 2, 2, 1, 3, 3]


def meta_mat():
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    table = np.array([(i, w, 3 if i == 4 else 0) for i, w in IDS.items()], dtype=kind)
    stream = io.BytesIO()
    savemat(stream, {"synsets": table.reshape(-1, 1)})
    return stream.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("ilsvrc")
    train = {wnid: [jpeg(10 * c + i) for i in range(5)] for c, wnid in enumerate(WNIDS)}
    (root / "ILSVRC2012_img_train.tar").write_bytes(outer_tar(train))
    val = [(f"ILSVRC2012_val_{n + 1:08d}.JPEG", jpeg(100 + n)) for n in range(len(TRUTH))]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as kit:
        truth = "".join(f"{number}\n" for number in TRUTH).encode()
        prefix = "ILSVRC2012_devkit_t12/data/"
        for name, data in [
            ("ILSVRC2012_validation_ground_truth.txt", truth),
            ("meta.mat", meta_mat()),
        ]:
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(data)
            kit.addfile(entry, io.BytesIO(data))
    lines = [f"ILSVRC2012_val_{n + 1:08d}.JPEG {IDS[number]}" for n, number in enumerate(TRUTH)]
    (root / "val.txt").write_text("\n".join(lines))
    solution = [
        f"ILSVRC2012_val_{n + 1:08d},{IDS[number]} 1 2 3 4" for n, number in enumerate(TRUTH)
    ]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(solution))
    return root


def expected_val():
    rows = enumerate(TRUTH)
    return {
        (f"ILSVRC2012_val_{n + 1:08d}", jpeg(100 + n), WNIDS.index(IDS[number]))
        for n, number in rows
    }


def test_a_directory_with_all_three_archives(raw, tmp_path, run):
    words = ("build", "--dataset", "imagenet1k", "--source", raw, "--workers", 1)
    assert run(*words, "--out", tmp_path / "b", "--split", "both") == 0
    assert set(samples(tmp_path / "b/val")) == expected_val()
    train = samples(tmp_path / "b/train")
    assert {(key, label) for key, _, label in train} == {
        (f"{wnid}_{n}", c) for c, wnid in enumerate(WNIDS) for n in range(5)
    }
    assert manifest(tmp_path / "b/val")["classes"] == WNIDS


@pytest.mark.parametrize("labels", ["devkit", "val.txt", "LOC_val_solution.csv"])
def test_val_alone_with_any_form_of_labels(labels, raw, tmp_path, run):
    source = [raw / "ILSVRC2012_img_val.tar"]
    extra = ()
    if labels == "devkit":
        source.append(raw / "ILSVRC2012_devkit_t12.tar.gz")
    else:
        extra = ("--val-labels", raw / labels)
    words = ("build", "--dataset", "imagenet1k", "--source", *source, "--workers", 2)
    assert run(*words, *extra, "--out", tmp_path / "v", "--split", "val") == 0
    assert set(samples(tmp_path / "v")) == expected_val()
    assert manifest(tmp_path / "v")["split"] == "val"


@pytest.mark.parametrize("split", ["", "train", "val"])
def test_one_part_of_a_directory_that_holds_both(split, raw, tmp_path, run):
    words = ("build", "--dataset", "imagenet1k", "--source", raw, "--workers", 1)
    chosen = ("--split", split) if split else ()
    assert run(*words, *chosen, "--out", tmp_path / "o") == 0
    found = samples(tmp_path / "o")
    if split == "val":
        assert set(found) == expected_val()
    else:
        assert len(found) == 15 and not set(found) & expected_val()
    assert manifest(tmp_path / "o")["split"] == (split or "train")
    assert manifest(tmp_path / "o")["classes"] == WNIDS


def test_a_second_validation_rule_is_refused(raw, tmp_path, run, capsys):
    words = ("build", "--dataset", "imagenet1k", "--source", raw, "--workers", 1)
    extra = ("--split", "both", "--val-fraction", 0.1, "--out", tmp_path / "o")
    assert run(*words, *extra) == 1
    assert "own validation part" in capsys.readouterr().err


def test_val_without_labels_says_what_is_missing(raw, tmp_path, run, capsys):
    source = raw / "ILSVRC2012_img_val.tar"
    words = ("build", "--dataset", "imagenet1k", "--source", source, "--workers", 1)
    assert run(*words, "--out", tmp_path / "v", "--split", "val") == 1
    assert "devkit" in capsys.readouterr().err


def test_unpacked_train_and_val_folders(tmp_path, run):
    for part, count in (("train", 4), ("val", 2)):
        for c, wnid in enumerate(WNIDS):
            folder = tmp_path / "raw" / part / wnid
            folder.mkdir(parents=True)
            for n in range(count):
                seed = 1000 * len(part) + 10 * c + n
                (folder / f"{part}_{n}.JPEG").write_bytes(jpeg(seed))
    words = ("build", "--dataset", "imagenet1k", "--source", tmp_path / "raw", "--workers", 1)
    assert run(*words, "--out", tmp_path / "b", "--split", "both") == 0
    assert manifest(tmp_path / "b/train")["class_counts"] == [4, 4, 4]
    assert manifest(tmp_path / "b/val")["class_counts"] == [2, 2, 2]
