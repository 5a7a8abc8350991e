"""Archives are hostile input: nothing is written outside the output, no link is followed."""

import io
import tarfile

import pytest
from raw_archives import jpeg, tar_bytes
from shard_contents import lines, samples


def special(name, kind, target=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.fixture
def hostile(tmp_path):
    secret = tmp_path / "secret.JPEG"
    secret.write_bytes(jpeg(999))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        plain = [
            "../../escape.JPEG",
            "/tmp/absolute.JPEG",
            "n95000000_1.JPEG",
            "a/../../b.JPEG",
            "x" * 300 + ".JPEG",
            "new\nline.JPEG",
            "sp ace;$(touch x).JPEG",
            ".JPEG",
        ]
        for number, name in enumerate(plain):
            entry = tarfile.TarInfo(name)
            data = jpeg(number)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        archive.addfile(special("n95000000_7.JPEG", tarfile.SYMTYPE, str(secret)))
        archive.addfile(special("n95000000_8.JPEG", tarfile.LNKTYPE, "n95000000_1.JPEG"))
        archive.addfile(special("n95000000_9.JPEG", tarfile.FIFOTYPE))
        inner = tar_bytes([("n95000000_10.JPEG", jpeg(50))])
        entry = tarfile.TarInfo("deeper.tar")
        entry.size = len(inner)
        archive.addfile(entry, io.BytesIO(inner))
        entry = tarfile.TarInfo("n95000000_11.JPEG")
        entry.size = 3 << 20
        archive.addfile(entry, io.BytesIO(bytes(3 << 20)))
    path = tmp_path / "raw/whole.tar"
    path.parent.mkdir()
    members = [("../n95000000.tar", stream.getvalue()), ("readme.txt", b"hello")]
    path.write_bytes(tar_bytes(members))
    return path


def test_member_names_never_become_paths(hostile, tmp_path, run):
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "out"
    words = ("build", "--dataset", "imagenet22k", "--source", hostile, "--out", out)
    assert run(*words, "--workers", 1, "--max-bytes", "1M") == 0
    written = set(tmp_path.rglob("*")) - before
    assert all(path == out or out in path.parents for path in written)
    found = samples(out)
    assert {data for _, data, _ in found} == {jpeg(number) for number in range(8)}
    for key, _, _ in found:
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        assert 0 < len(key) <= 90
    reasons = {e["member"]: e["reason"] for e in lines(out / "rejected.jsonl")}
    assert reasons == {
        "n95000000_7.JPEG": "link",
        "n95000000_8.JPEG": "link",
        "n95000000_9.JPEG": "not-a-file",
        "deeper.tar": "nested-archive",
        "n95000000_11.JPEG": "too-many-bytes",
        "readme.txt": "outside-classes",
    }


def test_gzip_sources_are_staged_under_numbers(hostile, tmp_path, run):
    import gzip

    packed = tmp_path / "raw/whole.tar.gz"
    packed.write_bytes(gzip.compress(hostile.read_bytes()[:-2048] + bytes(2048)))
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "out"
    words = ("build", "--dataset", "imagenet22k", "--source", packed, "--out", out)
    status = run(*words, "--workers", 1, "--max-bytes", "1M")
    written = set(tmp_path.rglob("*")) - before
    assert all(path == out or out in path.parents for path in written)
    assert status in (0, 1)
