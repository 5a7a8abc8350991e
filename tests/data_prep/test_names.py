"""Names no one would choose: they are shown by one rule and crash nothing."""

import io
import os
import tarfile

import pytest
from raw_archives import encoded, jpeg, picture, zipped
from shard_contents import lines, manifest, samples

from data_prep.names import escaped, is_hidden, sample_key

ODD = b"caf\xe9 \xff".decode("utf-8", "surrogateescape")


def test_the_one_rule():
    assert escaped("plain name-1.JPEG") == "plain name-1.JPEG"
    assert escaped("ü 猫 🐈.jpg") == "ü 猫 🐈.jpg"
    assert escaped(ODD) == "caf\\xe9 \\xff"
    assert escaped("new\nline\x1b[31m\x85\ud800") == "new\\x0aline\\x1b[31m\\x85\\ud800"
    escaped(ODD).encode()


def test_hidden_names():
    assert all(map(is_hidden, [".DS_Store", "a/._n91000000.tar", "x/__MACOSX"]))
    assert not any(map(is_hidden, ["a.b", "../n91000000.tar", "./x/y.jpg"]))


def test_long_odd_names_have_keys():
    name = "x" * 100 + ODD + ".JPEG"
    key = sample_key("n1", name)
    assert key == sample_key("n1", name) and len(key) <= 80 and key.isascii()
    assert key != sample_key("n1", name.replace("\udcff", "\udcfe"))


def odd_tar(members):
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape"
    ) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


MEMBERS = [
    (f"{ODD}.JPEG", jpeg(1)),
    ("y" * 120 + f"{ODD}.JPEG", jpeg(2)),
    (f"again {ODD}.JPEG", jpeg(1)),  # the same bytes: a duplicate
    (f"cut {ODD}.JPEG", jpeg(3)[:900]),
    (f"png {ODD}.JPEG", encoded(picture(4), "PNG")),
    (f"packed {ODD}.JPEG", zipped(jpeg(5))),
    ("line\nbreak\ttab.JPEG", jpeg(6)[:900]),
    ("z" * 5000 + ".JPEG", jpeg(7)),
]


@pytest.mark.parametrize("gzipped", [False, True])
def test_names_that_are_not_utf_8_crash_nothing(gzipped, tmp_path, run):
    """Records, thumbnails, the report, verify and --repair, in an archive of such a name itself."""
    inner = odd_tar(MEMBERS)
    outer = odd_tar([(f"{ODD}/n95000000.tar", inner), (f"notes {ODD}.txt", b"x")])
    source = tmp_path / f"raw {ODD}.tar"
    source.write_bytes(zipped(outer) if gzipped else outer)
    out = tmp_path / "out"
    words = ("build", "--dataset", "imagenet22k", "--source", source, "--out", out)
    assert run(*words, "--workers", 1) == 0
    assert {data for _, data, _ in samples(out)} >= {jpeg(1), jpeg(2), jpeg(5)}
    assert len(samples(out)) == 4
    events = {e["reason"]: e for e in lines(out / "rejected.jsonl")}
    assert events["duplicate"]["member"] == f"again {escaped(ODD)}.JPEG"
    assert events["outside-classes"]["member"] == f"notes {escaped(ODD)}.txt"
    assert escaped(ODD) in events["truncated"]["source"]
    assert events["name-too-long"]["member"].startswith("zzz")
    members = {e["member"] for e in lines(out / "rejected.jsonl")}
    assert "line\\x0abreak\\x09tab.JPEG" in members
    assert run("report", out) == 0
    assert escaped(ODD) in (out / "report.html").read_text()
    tar = out / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024] + bytes(1023) + b"x")
    assert run("verify", out, "--repair", "--workers", 1) == 0
    assert run("verify", out, "--workers", 1, "--decode", 1) == 0


def test_class_folders_and_files_of_such_names(tmp_path, run):
    for folder in (b"caf\xe9", b"plain", "猫".encode()):
        (tmp_path / "raw" / os.fsdecode(folder)).mkdir(parents=True)
        for number in range(3):
            path = tmp_path / "raw" / os.fsdecode(folder) / os.fsdecode(b"\xff%d.jpg" % number)
            path.write_bytes(jpeg(100 * len(folder) + number))
    out = tmp_path / "out"
    words = ("build", "--dataset", "folder", "--split", "train", "--source", tmp_path / "raw")
    assert run(*words, "--out", out, "--workers", 1) == 0
    assert manifest(out)["classes"] == ["caf\\xe9", "plain", "猫"]
    assert len(samples(out)) == 9 and run("report", out) == 0
