"""verify notices every kind of damage and --repair mends it to the very same bytes."""

import json
import shutil
import tarfile

import pytest
from raw_archives import encoded, jpeg, outer_tar, picture, zipped
from shard_contents import tree

from data_prep.__main__ import main


@pytest.fixture(scope="module", params=["tar", "gzip"])
def built(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    classes = {
        "n96000000": [jpeg(i) for i in range(12)] + [zipped(jpeg(20)), b""],
        "n96000001": [encoded(picture(30 + i), "PNG") for i in range(3)] + [jpeg(40), jpeg(41)],
    }
    data = outer_tar(classes)
    source = root / ("raw.tar" if request.param == "tar" else "raw.tar.gz")
    source.write_bytes(data if request.param == "tar" else zipped(data))
    words = ["build", "--dataset", "imagenet22k", "--source", str(source)]
    out = root / "out"
    words += ["--out", str(out), "--workers", "1", "--split", "both", "--val-per-class", "2"]
    assert main([*words, "--shard-samples", "5"]) == 0
    return out


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def damage(kind, directory):
    tar, index = directory / "shard-000001.tar", directory / "shard-000001.idx"
    if kind == "bit":
        flip(tar, tar.stat().st_size // 2)
    elif kind == "cut":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif kind == "no tar":
        tar.unlink()
    elif kind == "no index":
        index.unlink()
    elif kind == "index":
        index.write_text(index.read_text().replace("jpg 512 ", "jpg 513 "))
    elif kind == "checksums":
        flip(tar.with_suffix(".crc"), 3)
    elif kind == "no checksums":
        tar.with_suffix(".crc").unlink()
    elif kind == "labels":
        flip(tar.with_suffix(".lab"), 4)
    elif kind == "info":
        info = json.loads((directory / "_info.json").read_text())
        info["splits"]["train"]["shard_lengths"][0] -= 1
        (directory / "_info.json").write_text(json.dumps(info))


KINDS = ["bit", "cut", "no tar", "no index", "index", "checksums", "no checksums", "labels", "info"]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_and_mended(kind, built, run, capsys):
    directory = built / "train"
    before = tree(built)
    assert run("verify", directory, "--decode", 1, "--workers", 1) == 0
    damage(kind, directory)
    assert run("verify", directory, "--workers", 1) == 1
    named = "_info.json" if kind == "info" else "shard-000001"
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert run("verify", directory, "--repair", "--workers", 1) == 0
    assert tree(built) == before
    assert run("verify", directory, "--workers", 2) == 0


def test_a_consistent_lie_is_found_too(built, tmp_path, run, capsys):
    """Hashes in the manifest that match a shard with bad content."""
    from l2vit.files import sha256_file

    directory = tmp_path / "copy"
    shutil.copytree(built / "train", directory)

    def rehash():
        about = json.loads((directory / "manifest.json").read_text())
        for shard in about["shards"]:
            shard["sha256"] = sha256_file(directory / shard["name"])
            shard["index_sha256"] = sha256_file(directory / shard["name"].replace(".tar", ".idx"))
        (directory / "manifest.json").write_text(json.dumps(about))
        from l2vit.data.manifest import Manifest

        about["hash"] = Manifest._parse(about, directory).hash
        (directory / "manifest.json").write_text(json.dumps(about))

    tar = directory / "shard-000000.tar"
    sound = tar.read_bytes()
    with tarfile.open(tar) as archive:
        label = archive.getmembers()[1].offset_data
    for lie in (b"00009", b"0000x"):
        tar.write_bytes(sound[:label] + lie + sound[label + 5 :])
        rehash()
        assert run("verify", directory, "--workers", 1) == 1
        assert "no label of 2 classes" in capsys.readouterr().err
    place = sound.find(b"\xff\xda") + 60
    tar.write_bytes(sound[:place] + bytes(200) + sound[place + 200 :])
    rehash()
    assert run("verify", directory, "--workers", 1) == 1
    assert "checksum of" in capsys.readouterr().err


def test_an_unfinished_directory_is_no_shard_directory(tmp_path, run, capsys):
    assert run("verify", tmp_path) == 1
    assert "manifest.json" in capsys.readouterr().err


def test_repair_without_source_says_so(built, tmp_path, run, capsys):
    directory = tmp_path / "alone"
    shutil.copytree(built / "train", directory)
    damage("bit", directory)
    assert run("verify", directory, "--repair", "--workers", 1) == 1
    assert "build anew" in capsys.readouterr().err
