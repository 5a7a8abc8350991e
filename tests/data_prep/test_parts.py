"""A folder of images as people have it: its parts, what lies beside them, what is refused."""

import shutil

import pytest
from raw_archives import class_members, encoded, jpeg, picture, tar_bytes
from shard_contents import lines, manifest, samples, tree

CLASSES = ("cat", "dog", "owl")


def fill(folder, seed, images=6, classes=CLASSES):
    """Class folders of distinct JPEGs."""
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(images):
            data = jpeg(seed + 100 * c + number)
            (folder / name / f"{folder.name}{number}.jpg").write_bytes(data)


def pictures(folder):
    return {path.read_bytes() for path in folder.rglob("*.jpg")}


def build(run, source, out, *more):
    return run("build", "--dataset", "folder", "--source", source, "--out", out, *more)


def stored(directory):
    return {data for _, data, _ in samples(directory)}


@pytest.mark.parametrize("val", ["val", "validation", "Valid"])
def test_an_image_folder_with_all_parts(val, tmp_path, run, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for part, seed in (("train", 0), (val, 1000), ("test", 2000)):
        fill(raw / part, seed)
    (raw / "README.md").write_text("about")
    assert build(run, raw, out, "--workers", 1) == 0
    for part, folder in (("train", "train"), ("val", val), ("test", "test")):
        assert stored(out / part) == pictures(raw / folder)
        about = manifest(out / part)
        assert about["split"] == part and about["classes"] == list(CLASSES)
        assert about["class_counts"] == [6, 6, 6]
        assert about["provenance"]["members_seen"] == 18
        assert about["provenance"]["fates"] == {part: 18}
        assert about["provenance"]["split_rule"] == "the source's own part"
        assert run("verify", out / part, "--workers", 1) == 0
    text = capsys.readouterr().out
    for part in ("train", "val", "test"):
        assert f"the source's {part} part: 3 classes" in text
    assert "outside-classes 1: README.md" in text
    before = tree(out)
    assert build(run, raw, out, "--workers", 1) == 0  # again: complete
    assert "already complete" in capsys.readouterr().out and tree(out) == before


@pytest.mark.parametrize("layout", ["classes", "train", "train and test"])
def test_without_a_validation_part_a_tenth_becomes_one(layout, tmp_path, run, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    train = raw if layout == "classes" else raw / "train"
    fill(train, 0, 60)
    if layout == "train and test":
        fill(raw / "test", 9000, 3)
    assert build(run, raw, out, "--workers", 1) == 0
    assert "10% of its images become one" in capsys.readouterr().out
    mine, theirs = stored(out / "train"), stored(out / "val")
    assert mine | theirs == pictures(train) and not mine & theirs
    assert 5 <= len(theirs) <= 36  # 18 expected of 180
    assert "below 0.1" in manifest(out / "val")["provenance"]["split_rule"]
    assert (out / "test").exists() == (layout == "train and test")
    if layout == "train and test":
        assert stored(out / "test") == pictures(raw / "test")
    same = ("--dataset", "folder", "--source", train, "--val-fraction", 0.1, "--workers", 1)
    assert run("build", *same, "--split", "both", "--out", tmp_path / "same") == 0
    assert stored(tmp_path / "same/val") == theirs


def test_a_rule_of_ones_own(tmp_path, run):
    fill(tmp_path / "raw", 0)
    assert build(run, tmp_path / "raw", tmp_path / "out", "--val-per-class", 2) == 0
    assert manifest(tmp_path / "out/val")["class_counts"] == [2, 2, 2]
    fill(tmp_path / "own/train", 0)
    fill(tmp_path / "own/val", 500)
    assert build(run, tmp_path / "own", tmp_path / "o", "--val-per-class", 2) == 1


def test_one_part_of_a_folder(tmp_path, run):
    for part, seed in (("train", 0), ("val", 1000), ("test", 2000)):
        fill(tmp_path / "raw" / part, seed)
    for part in ("train", "val"):
        assert build(run, tmp_path / "raw", tmp_path / part, "--split", part) == 0
        assert stored(tmp_path / part) == pictures(tmp_path / "raw" / part)


def test_verify_and_report_take_all_parts_of_a_build(tmp_path, run, capsys):
    fill(tmp_path / "raw/train", 0)
    fill(tmp_path / "raw/val", 500)
    out = tmp_path / "out"
    assert build(run, tmp_path / "raw", out, "--workers", 1) == 0
    assert run("verify", out, "--workers", 1) == 0
    text = capsys.readouterr().out
    assert f"{out / 'train'}: 18 samples" in text and f"{out / 'val'}: 18 samples" in text
    assert run("report", out) == 0
    assert (out / "train/report.html").exists() and (out / "val/report.html").exists()
    assert run("report", out, "--out", tmp_path / "page.html") == 2
    data = bytearray((out / "val/shard-000000.tar").read_bytes())
    data[700] ^= 1
    (out / "val/shard-000000.tar").write_bytes(data)
    assert run("verify", out, "--workers", 1) == 1
    assert "val/shard-000000.tar" in capsys.readouterr().err
    assert run("verify", out, "--repair", "--workers", 1) == 0
    assert run("verify", tmp_path / "raw", "--workers", 1) == 1  # no shards at all


def test_parts_given_one_by_one_are_not_mixed(tmp_path, run):
    for part, seed in (("train", 0), ("val", 1000), ("test", 2000)):
        fill(tmp_path / "raw" / part, seed)
    sources = [tmp_path / "raw" / part for part in ("val", "train", "test")]
    words = ("build", "--dataset", "folder", "--source", *sources, "--out", tmp_path / "out")
    assert run(*words, "--workers", 1) == 0
    for part in ("train", "val", "test"):
        assert stored(tmp_path / "out" / part) == pictures(tmp_path / "raw" / part)


def test_an_unlabelled_test_part_is_left_out_and_said(tmp_path, run, capsys):
    raw = tmp_path / "raw"
    fill(raw / "train", 0, 40)
    (raw / "test").mkdir()
    for number in range(4):
        (raw / f"test/{number}.jpg").write_bytes(jpeg(number))
    assert build(run, raw, tmp_path / "out", "--workers", 1) == 0
    assert "test has no class folders: left out" in capsys.readouterr().out
    assert not (tmp_path / "out/test").exists()


def test_classes_only_a_later_part_has_are_warned_of(tmp_path, run, capsys):
    fill(tmp_path / "raw/train", 0)
    fill(tmp_path / "raw/val", 500, classes=(*CLASSES, "yak"))
    assert build(run, tmp_path / "raw", tmp_path / "out", "--workers", 1) == 0
    assert "warning: val has classes that train lacks: yak" in capsys.readouterr().out


def refusal(run, capsys, source, out, *more):
    assert build(run, source, out, *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_folders_of_folders_are_no_classes(tmp_path, run, capsys):
    fill(tmp_path / "raw/training", 0)
    fill(tmp_path / "raw/testing", 500)
    error = refusal(run, capsys, tmp_path / "raw", tmp_path / "out")
    assert "holds only folders (cat, dog, owl)" in error and "raw/testing" in error
    shutil.rmtree(tmp_path / "raw")
    fill(tmp_path / "raw/train", 0)
    fill(tmp_path / "raw/test", 500)
    fill(tmp_path / "raw/extra", 900)
    assert "holds only folders" in refusal(run, capsys, tmp_path / "raw", tmp_path / "out")


def test_two_parts_of_one_role_are_refused(tmp_path, run, capsys):
    for part in ("train", "val", "validation"):
        fill(tmp_path / "raw" / part, 0)
    error = refusal(run, capsys, tmp_path / "raw", tmp_path / "out")
    assert "more than one val part: val, validation" in error


def test_class_folders_beside_an_archive_are_refused(tmp_path, run, capsys):
    fill(tmp_path / "raw", 0)
    (tmp_path / "raw/more.tar").write_bytes(tar_bytes(class_members("n", [jpeg(1)])))
    error = refusal(run, capsys, tmp_path / "raw", tmp_path / "out")
    assert "folders (cat, dog, owl) beside archives (more.tar)" in error


@pytest.mark.parametrize("inside", ["", "shards", "a/b"])
def test_shards_among_the_images_are_refused(inside, tmp_path, run, capsys):
    fill(tmp_path / "raw", 0)
    before = tree(tmp_path)
    error = refusal(run, capsys, tmp_path / "raw", tmp_path / "raw" / inside)
    assert "--out" in error and "--source" in error and tree(tmp_path) == before
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    assert "--out" in refusal(run, capsys, tmp_path / "link", tmp_path / "raw" / inside)


def test_an_earlier_build_without_parts_is_not_mixed_with(tmp_path, run, capsys):
    fill(tmp_path / "raw", 0)
    assert build(run, tmp_path / "raw", tmp_path / "out", "--split", "train") == 0
    shutil.rmtree(tmp_path / "out/.build")
    assert build(run, tmp_path / "raw", tmp_path / "out") == 1
    assert "holds shards" in capsys.readouterr().err and not (tmp_path / "out/val").exists()


def test_every_file_is_looked_at_whatever_its_name(tmp_path, run, capsys):
    raw = tmp_path / "raw"
    good = {
        "a.jfif": jpeg(1),
        "b.jpe": jpeg(2),
        "c": jpeg(3),
        "d.JPEG~": jpeg(4),
        "e.avif": encoded(picture(5), "AVIF"),
        "f.txt": jpeg(6),
        "deep/g.jpg": jpeg(7),
    }
    bad = {
        "notes.txt": (b"words", "unrecognised"),
        ".DS_Store": (b"\0\0\0\1Bud1", "unrecognised"),
        "._a.jfif": (b"\0\5\x16\7", "unrecognised"),
        "more.tar": (tar_bytes([("x.jpg", jpeg(8))]), "nested-archive"),
        "empty.jpg": (b"", "empty"),
    }
    for name, data in [*good.items(), *((name, data) for name, (data, _) in bad.items())]:
        path = raw / "cat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    outside = tmp_path / "elsewhere"
    fill(outside, 50, 1)
    (raw / "cat/linked").symlink_to(outside)
    (raw / "cat/gone.jpg").symlink_to(tmp_path / "nowhere")
    (raw / "cat/followed.jpg").symlink_to(outside / "cat/elsewhere0.jpg")
    (raw / ".cache").mkdir()
    (raw / "__MACOSX").mkdir()
    (raw / "loose.jpg").write_bytes(jpeg(9))
    assert build(run, raw, tmp_path / "out", "--split", "train", "--workers", 1) == 0
    assert manifest(tmp_path / "out")["classes"] == ["cat"]
    assert len(samples(tmp_path / "out")) == len(good) + 1
    reasons = {e["member"]: e["reason"] for e in lines(tmp_path / "out/rejected.jsonl")}
    assert reasons == {
        **{name: reason for name, (_, reason) in bad.items()},
        "linked": "link",
        "gone.jpg": "link",
        ".cache": "hidden-file",
        "__MACOSX": "hidden-file",
        "loose.jpg": "outside-classes",
    }
    text = capsys.readouterr().out
    assert "rejected: 10" in text and "outside-classes 1: loose.jpg" in text


def test_companion_files_of_macos_are_no_classes(tmp_path, run):
    root = tmp_path / "raw"
    root.mkdir()
    for number in range(3):
        tar = tar_bytes(class_members(f"n9100000{number}", [jpeg(number)]))
        (root / f"n9100000{number}.tar").write_bytes(tar)
        (root / f"._n9100000{number}.tar").write_bytes(b"\0\5\x16\7" + bytes(100))
    words = ("build", "--dataset", "imagenet22k", "--workers", 1)
    assert run(*words, "--source", root, "--out", tmp_path / "a") == 0
    inner = [(path.name, path.read_bytes()) for path in sorted(root.iterdir())]
    (tmp_path / "whole.tar").write_bytes(tar_bytes(inner))
    assert run(*words, "--source", tmp_path / "whole.tar", "--out", tmp_path / "b") == 0
    for out in (tmp_path / "a", tmp_path / "b"):
        assert manifest(out)["classes"] == [f"n9100000{number}" for number in range(3)]
        hidden = {e["member"] for e in lines(out / "rejected.jsonl")}
        assert hidden == {f"._n9100000{number}.tar" for number in range(3)}


def test_an_incomplete_validation_part_is_said_loudly(tmp_path, run, capsys):
    fill(tmp_path / "raw/train", 0)
    fill(tmp_path / "raw/val", 500)
    (tmp_path / "raw/train/cat/cut.jpg").write_bytes(jpeg(77)[:800])
    (tmp_path / "raw/val/dog/cut.jpg").write_bytes(jpeg(78)[:800])
    (tmp_path / "raw/val/dog/small.jpg").write_bytes(jpeg(79, 20, 20))
    assert build(run, tmp_path / "raw", tmp_path / "out", "--workers", 1) == 0
    text = capsys.readouterr().out
    (warning,) = [line for line in text.splitlines() if line.startswith("WARNING")]
    assert "val is incomplete: 2 of 20 files" in warning and "truncated 1, too-small 1" in warning
    assert "rejected: 1 (truncated 1: cat/cut.jpg)" in text
    assert "rejected: 2 (too-small 1: dog/small.jpg, truncated 1: dog/cut.jpg)" in text


def test_a_validation_part_of_the_sources_own_keeps_its_copies(tmp_path, run):
    """Published accuracies are of the whole part; what training shares with it leaves training."""
    fill(tmp_path / "raw/train", 0)
    fill(tmp_path / "raw/val", 500)
    shared = (tmp_path / "raw/val/cat/val0.jpg").read_bytes()
    (tmp_path / "raw/val/cat/twice.jpg").write_bytes(shared)
    (tmp_path / "raw/train/cat/leak.jpg").write_bytes(shared)
    assert build(run, tmp_path / "raw", tmp_path / "out", "--workers", 1) == 0
    assert manifest(tmp_path / "out/val")["class_counts"] == [7, 6, 6]
    assert manifest(tmp_path / "out/train")["class_counts"] == [6, 6, 6]
    assert [e["member"] for e in lines(tmp_path / "out/train/rejected.jsonl")] == ["leak.jpg"]
    assert [e["reason"] for e in lines(tmp_path / "out/val/rejected.jsonl")] == ["duplicate-kept"]
