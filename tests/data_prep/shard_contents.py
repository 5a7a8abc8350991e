"""Reads shard directories with nothing but tarfile and hashlib."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path


def samples(directory: Path) -> list[tuple[str, bytes, int]]:
    """(key, image bytes, label) of every sample in order."""
    found = []
    for name in [shard["name"] for shard in manifest(directory)["shards"]]:
        with tarfile.open(directory / name) as archive:
            members = archive.getmembers()
            assert all(m.isreg() and m.mtime == m.uid == m.gid == 0 for m in members)
            for image, label in zip(members[::2], members[1::2], strict=True):
                key, _, extension = image.name.partition(".")
                assert extension in ("jpg", "webp") and label.name == f"{key}.cls"
                text = archive.extractfile(label).read()
                assert len(text) == 5
                found.append((key, archive.extractfile(image).read(), int(text)))
    return found


def manifest(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(directory: Path) -> dict[str, str]:
    """SHA-256 of every published file (not of the build directory)."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".build" not in path.parts
    }
