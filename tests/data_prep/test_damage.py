"""Damage inside tars: nothing behind it is lost without a line that counts it."""

import gzip
import io
import struct
import tarfile

import pytest
from raw_archives import class_members, jpeg, tar_bytes
from shard_contents import lines, samples

from data_prep.archives import Damaged, members, open_window

CLASS = "n94000001"
IMAGES = [jpeg(3000 + number) for number in range(12)]


def headers(data):
    """Byte offset of each member's header, by tarfile itself."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [entry.offset for entry in archive.getmembers()]


def with_size(block, field):
    """A header with another size field and a checksum that fits."""
    block = block[:124] + field + block[136:]
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


def damaged_tars():
    """(name, tar, members kept, members lost as far as can be known, words of the detail)."""
    whole = tar_bytes(class_members(CLASS, IMAGES))
    place = headers(whole)
    six, seven = place[6], place[7]
    hole = bytearray(whole)
    hole[six : six + 19_968] = bytes(19_968)
    behind = sum(start >= six + 19_968 for start in place)
    zeroed = whole[:six] + bytes(512) + whole[six + 512 :]
    garbled = whole[:six] + b"\xa5" * 512 + whole[six + 512 :]
    huge = with_size(whole[six : six + 512], b"77777777777\0")
    negative = with_size(whole[six : six + 512], b"\xff" * 8 + struct.pack(">i", -51200))
    first, second = (
        tar_bytes(class_members(CLASS, IMAGES)[part]) for part in (slice(0, 7), slice(7, 12))
    )
    return [
        ("a header of zeros", zeroed, 6, 6, "are not its end; 6 members lost"),
        ("a hole", bytes(hole), 6, behind + 1, f"at least {behind + 1} members lost"),
        ("two tars in one", first + second, 7, 5, "are not its end; 5 members lost"),
        ("a garbled header", garbled, 6, 6, f"no tar header at byte {six}; 6 members lost"),
        ("a size past the end", whole[:six] + huge + whole[six + 512 :], 6, 6, "past the end"),
        ("a negative size", whole[:six] + negative + whole[six + 512 :], 6, 6, "is negative"),
        ("cut short", whole[: seven - 700], 6, 1, f"cut short at {CLASS}_6.JPEG"),
    ]


CASES = damaged_tars()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One outer archive of a sound class and seven damaged ones."""
    from data_prep.__main__ import main

    root = tmp_path_factory.mktemp("damage")
    inner = [("n94000000.tar", tar_bytes(class_members("n94000000", [jpeg(1), jpeg(2)])))]
    inner += [(f"n9400001{n}.tar", case[1]) for n, case in enumerate(CASES)]
    (root / "raw.tar").write_bytes(tar_bytes(inner))
    words = ["build", "--dataset", "imagenet22k", "--source", str(root / "raw.tar")]
    assert main([*words, "--out", str(root / "out"), "--workers", "1"]) == 0
    return root / "out"


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_each_damaged_class_archive_has_a_line_with_what_was_lost(number, built):
    _, _, kept, lost, words = CASES[number]
    name = f"n9400001{number}"
    (event,) = [e for e in lines(built / "rejected.jsonl") if e.get("class") == name]
    assert event["reason"] == "damaged-archive" and event["lost"] == lost
    assert words in event["detail"] and event["source"].endswith(f"raw.tar/{name}.tar")
    keys = {key for key, _, _ in samples(built) if key.startswith(name)}
    assert keys == {f"{name}_{CLASS}_{image}" for image in range(kept)}


def test_the_summary_counts_what_was_lost(built, tmp_path, run, capsys):
    words = ("build", "--dataset", "imagenet22k", "--source", built.parent / "raw.tar")
    assert run(*words, "--out", tmp_path / "out", "--workers", 1) == 0
    text = capsys.readouterr().out
    total = sum(case[3] for case in CASES)
    assert "damaged-archive 7" in text and f"{total} members lost in damaged archives" in text


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_a_damaged_source_of_its_own_stops_the_build(number, tmp_path, run, capsys):
    path = tmp_path / f"{CLASS}.tar"
    path.write_bytes(CASES[number][1])
    words = ("build", "--dataset", "imagenet22k", "--source", path, "--workers", 1)
    assert run(*words, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("hole", [512, 20_480])
def test_a_hole_in_an_outer_archive_loses_no_class_in_silence(packed, hole, tmp_path, run, capsys):
    inner = [(f"n9400002{n}.tar", tar_bytes(class_members("n", [jpeg(n)]))) for n in range(6)]
    data = bytearray(tar_bytes(inner))
    start = headers(bytes(data))[3]
    data[start : start + hole] = bytes(hole)
    path = tmp_path / "raw.tar"
    path.write_bytes(gzip.compress(data) if packed else data)
    words = ("build", "--dataset", "imagenet22k", "--source", path, "--workers", 1)
    assert run(*words, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"the zeros at byte {start} are not its end" in error and "lost" in error


@pytest.mark.parametrize("padding", [0, 512, 10_240, 1 << 20])
def test_zeros_to_the_end_are_an_end(padding, tmp_path):
    path = tmp_path / "padded.tar"
    path.write_bytes(tar_bytes(class_members(CLASS, IMAGES)) + bytes(padding))
    with open_window(path) as stream:
        found = [member.name for member in members(stream, path.stat().st_size, "it")]
    assert found == [f"{CLASS}_{number}.JPEG" for number in range(12)]


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
@pytest.mark.parametrize("size", [b"77777777777\0", b"\xff" * 8 + struct.pack(">i", -51200)])
def test_a_long_name_of_absurd_size_is_not_read(kind, size, tmp_path):
    """tarfile would read gigabytes, or everything, into memory."""
    whole = tar_bytes(class_members(CLASS, IMAGES[:2]))
    block = with_size(whole[:156] + kind + whole[157:512], size)
    path = tmp_path / "bomb.tar"
    path.write_bytes(block + whole)
    with open_window(path) as stream, pytest.raises(Damaged, match="header of"):
        list(members(stream, path.stat().st_size, "it"))


def test_random_damage_is_a_line_and_never_a_traceback(tmp_path):
    """Bytes overwritten anywhere: every member comes through or Damaged is raised; it ends."""
    import random

    draw = random.Random(5)
    whole = tar_bytes(
        [("long" * 60 + ".JPEG", b"x" * 700), *class_members(CLASS, [b"y" * 900] * 5)]
    )
    count = len(headers(whole))
    told = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            place = draw.choice([0, 512, 1024, 2560]) + draw.randrange(512)
            data[place] = draw.randrange(256)
        path = tmp_path / "it.tar"
        path.write_bytes(data)
        with open_window(path) as stream:
            try:
                found = [member.name for member in members(stream, len(data), "it")]
            except Damaged as error:
                told += 1
                assert "it" in str(error)
                continue
        assert len(found) == count
    assert told > 100


def test_a_gzip_inside_an_archive_is_named(tmp_path, run):
    good = tar_bytes(class_members("n94000000", [jpeg(1), jpeg(2)]))
    packed = gzip.compress(tar_bytes(class_members(CLASS, [jpeg(3)])))
    path = tmp_path / "raw.tar"
    path.write_bytes(tar_bytes([("n94000000.tar", good), (f"{CLASS}.tar", packed)]))
    words = ("build", "--dataset", "imagenet22k", "--source", path, "--workers", 1)
    assert run(*words, "--out", tmp_path / "out") == 0
    (event,) = lines(tmp_path / "out/rejected.jsonl")
    assert event["reason"] == "damaged-archive" and "gzip-compressed" in event["detail"]
    assert "checksum" not in event["detail"]
