"""Small releases and a way to run the program in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from raw_archives import small_release, write_release

from data_prep.__main__ import main


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fall11-shaped archive: 3 made-up classes of 20 distinct images."""
    return write_release(tmp_path_factory.mktemp("raw") / "whole.tar", small_release())


@pytest.fixture
def run() -> Callable[..., int]:
    """``run("build", "--out", path, ...)`` gives the exit status."""

    def call(*words: object) -> int:
        return main([str(word) for word in words])

    return call
