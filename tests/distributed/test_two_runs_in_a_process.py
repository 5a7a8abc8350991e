"""A second run in the same process, such as in a notebook, does not meet the first one's groups."""

from forked_ranks import Ranks
from small_runs import losses, settings, train


def train_both(paths):
    return max(train(path) for path in paths)


def test_both_end_as_alone(shards, tmp_path):
    short = {"schedule__length": "2 steps", "schedule__warmup": "0 steps"}
    paths = [settings(shards, tmp_path / name, **short) for name in ("first", "second")]
    ranks = Ranks(train_both, 1, paths, directory=tmp_path, raw=True)
    assert ranks.wait() == [0], ranks.log(0)[-3000:]
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
