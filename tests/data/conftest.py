"""Real-looking pictures as shards, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from photo_shards import Shards, jpeg, photo, write_shards


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """60 JPEGs of many shapes, smaller and larger than a crop."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(40, 160, (60, 2))
    return [jpeg(photo(i, int(w), int(h))) for i, (w, h) in enumerate(sizes)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, pictures: list[bytes]) -> Shards:
    """The 60 pictures in 5 shards, labels 0 … 9. Not to be changed."""
    labels = np.random.default_rng(6).integers(0, 10, len(pictures)).tolist()
    directory = tmp_path_factory.mktemp("shards")
    return write_shards(directory, pictures, labels, per_shard=13, classes=10)


@pytest.fixture
def make_shards(tmp_path: Path, pictures: list[bytes]) -> Callable[..., Shards]:
    """Makes fresh shards of the same pictures, for tests that damage them."""

    def make(**options: bool) -> Shards:
        labels = [i % 10 for i in range(len(pictures))]
        return write_shards(
            tmp_path / "fresh", pictures, labels, per_shard=13, classes=10, **options
        )

    return make
