import pytest
from small_runs import build_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Shards of small coloured pictures: ``train`` and ``val`` beneath."""
    return build_shards(tmp_path_factory.mktemp("engine"))
