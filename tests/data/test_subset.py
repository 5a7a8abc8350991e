"""Subsets against a plain reading of what was written into the shards."""

from __future__ import annotations

import numpy as np
import pytest

from l2vit.data.config import SubsetConfig
from l2vit.data.subset import subset_ids
from l2vit.errors import ConfigError, UserError


def ids(shards, seed=0, **settings):
    return subset_ids(SubsetConfig(**settings), shards.directory, shards.manifest, seed=seed)


def test_nothing_set_means_everything(shards):
    assert ids(shards) is None


def test_classes_keys_and_both(shards, tmp_path):
    classes, keys = tmp_path / "classes.txt", tmp_path / "keys.txt"
    classes.write_text("n00000003\n\nn00000007\n")
    keys.write_text("\n".join(shards.keys[i] for i in (0, 13, 59)))
    of_classes = [i for i, label in enumerate(shards.labels) if label in (3, 7)]
    assert ids(shards, classes=str(classes)).tolist() == of_classes
    without = [i for i in range(60) if i not in (0, 13, 59)]
    assert ids(shards, exclude=str(keys)).tolist() == without
    both = ids(shards, classes=str(classes), exclude=str(keys))
    assert both.tolist() == [i for i in of_classes if i in without]


def test_label_files_save_reading_the_shards(make_shards, tmp_path):
    shards = make_shards()
    classes = tmp_path / "classes.txt"
    classes.write_text("n00000003")
    inside = ids(shards, classes=str(classes)).tolist()
    assert inside == [i for i, label in enumerate(shards.labels) if label == 3]
    first = 0
    for shard in shards.manifest.shards:
        labels = np.array(shards.labels[first : first + shard.samples], "<u4")
        labels.tofile((shards.directory / shard.name).with_suffix(".lab"))
        (shards.directory / shard.name).unlink()
        first += shard.samples
    assert ids(shards, classes=str(classes)).tolist() == inside
    labels[:-1].tofile((shards.directory / shard.name).with_suffix(".lab"))
    with pytest.raises(UserError, match=f"{shard.name}.*{shard.samples} of 10 classes"):
        ids(shards, classes=str(classes))


def test_a_damaged_label_or_index_is_named(make_shards, tmp_path):
    shards = make_shards()
    names = tmp_path / "names.txt"
    names.write_text("n00000003")
    tar = shards.directory / shards.manifest.shards[2].name
    tar.write_bytes(tar.read_bytes().replace(b"00003", b"0000x"))
    with pytest.raises(UserError, match=f"{tar.name}.*0000x"):
        ids(shards, classes=str(names))
    names.write_text(shards.keys[0])
    index = tar.with_suffix(".idx")
    index.write_text("\n".join(index.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match=index.name):
        ids(shards, exclude=str(names))


def test_a_fraction_is_a_stable_share(shards):
    half = ids(shards, fraction=0.5)
    assert 15 < len(half) < 45 and len(np.unique(half)) == len(half)
    np.testing.assert_array_equal(half, ids(shards, fraction=0.5))
    assert set(ids(shards, fraction=0.25).tolist()) <= set(half.tolist())
    assert not np.array_equal(half, ids(shards, fraction=0.5, seed=1))


@pytest.mark.parametrize("what, line", [("classes", "n99999999"), ("exclude", "nobody")])
def test_unknown_names_are_refused(shards, tmp_path, what, line):
    path = tmp_path / "list.txt"
    path.write_text(line)
    with pytest.raises(ConfigError, match=line):
        ids(shards, **{what: str(path)})
    with pytest.raises(ConfigError, match="cannot read"):
        ids(shards, **{what: str(tmp_path / "absent.txt")})


def test_an_empty_subset_is_refused(shards, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("\n".join(shards.keys))
    with pytest.raises(ConfigError, match="no sample"):
        ids(shards, exclude=str(keys))
