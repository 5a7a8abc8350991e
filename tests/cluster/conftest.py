import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import small_runs


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Shards of small coloured pictures."""
    return small_runs.build_shards(tmp_path_factory.mktemp("shards"), 80)
