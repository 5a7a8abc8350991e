"""The label contract against timm's own tables and index files."""

import importlib.resources

import numpy as np
import pytest
from timm.data import ImageNetInfo

from l2vit.data import labels
from l2vit.data.manifest import class_hash
from l2vit.errors import UserError

TIMM = {
    "imagenet1k": "imagenet-1k",
    "imagenet12k": "imagenet-12k",
    "imagenet22k": "imagenet-22k",
    "imagenet21k-goog": "imagenet-21k-goog",
    "imagenet21k-p-fall11": "imagenet-21k-miil",
    "imagenet22k-ms": "imagenet-22k-ms",
}


def timm_indices(name):
    path = importlib.resources.files("timm.data") / "_info" / name
    return np.array([int(line) for line in path.read_text().split()])


@pytest.mark.parametrize(("ours", "theirs"), TIMM.items())
def test_lists_are_timms(ours, theirs):
    assert list(labels.class_list(ours)) == ImageNetInfo(theirs).label_names()


def test_counts():
    counts = {name: len(labels.layout(name)) for name in labels.LAYOUTS}
    assert counts == {
        "imagenet1k": 1000,
        "imagenet12k": 11821,
        "imagenet22k": 21841,
        "imagenet21k-goog": 21843,
        "imagenet21k-p-fall11": 11221,
        "imagenet21k-p-winter21": 10450,
        "imagenet22k-ms": 21842,
        "imagenet22k-swin": 21841,
    }


@pytest.mark.parametrize(
    ("file", "source", "target"),
    [
        ("imagenet21k_goog_to_12k_indices.txt", "imagenet21k-goog", "imagenet12k"),
        ("imagenet21k_goog_to_22k_indices.txt", "imagenet21k-goog", "imagenet22k"),
        ("imagenet22k_ms_to_12k_indices.txt", "imagenet22k-ms", "imagenet12k"),
        ("imagenet22k_ms_to_22k_indices.txt", "imagenet22k-ms", "imagenet22k"),
        ("imagenet22k_to_12k_indices.txt", "imagenet22k", "imagenet12k"),
    ],
)
def test_conversions_equal_timms_index_files(file, source, target):
    rows = labels.row_map(labels.layout(source), labels.layout(target))
    assert rows.tolist() == timm_indices(file).tolist()
    values = np.arange(len(labels.layout(source)) * 2.0).reshape(-1, 2)
    found = labels.convert(values, labels.layout(source), labels.layout(target))
    assert np.array_equal(found, values[timm_indices(file)])


def test_missing_classes_are_an_error_or_filled():
    whole, small = labels.layout("imagenet22k"), labels.layout("imagenet1k")
    values = np.random.default_rng(0).normal(size=len(whole)).astype(np.float32)
    with pytest.raises(UserError, match="n04399382"):
        labels.convert(values, whole, small)
    found = labels.convert(values, whole, small, fill=-9.0)
    assert found.dtype == np.float32 and (found == -9).sum() == 1
    assert found[small.index("n04399382")] == -9
    with pytest.raises(UserError, match="rows"):
        labels.convert(values[1:], whole, small)


def test_there_and_back_is_the_identity():
    order = np.random.default_rng(0).permutation(21841)
    whole = labels.class_list("imagenet22k")
    mixed = tuple(whole[place] for place in order)
    values = np.arange(21841)
    there = labels.convert(values, whole, mixed)
    assert np.array_equal(there, order)
    assert np.array_equal(labels.convert(there, mixed, whole), values)


def test_swin_rows_agree_with_its_published_map():
    """Some lines of the 1k map that Swin's repository publishes (0-based line: row)."""
    published = {0: 359, 1: 368, 960: 13444, 975: 14324, 982: 15732, 989: 20019, 999: 21817}
    swin, names = labels.layout("imagenet22k-swin"), labels.class_list("imagenet1k")
    assert {line: swin.index(names[line]) for line in published} == published
    assert sum(row is not None for row in swin) == 999
    with pytest.raises(UserError, match="999 of 21841"):
        labels.class_list("imagenet22k-swin")


def test_a_layout_from_a_1k_map():
    names = labels.class_list("imagenet1k")
    rows = [3 * n for n in range(1000)]
    made = labels.layout_from_map(rows, 3000)
    assert made[0] == names[0] and made[2997] == names[999] and made[1] is None
    assert "n04399382" not in made
    for bad in (rows[1:], [*rows[:-1], 3000]):
        with pytest.raises(UserError):
            labels.layout_from_map(bad, 3000)
    with pytest.raises(UserError, match="twice"):
        labels.row_map(["a", "a"], ["a"])


def test_recognition():
    whole = labels.class_list("imagenet22k")
    assert labels.recognise(reversed(whole)) == labels.Release("fall11", whole)
    kept = set(labels.class_list("imagenet21k-p-winter21"))
    extra = [wnid for wnid in whole if wnid not in kept][: 19167 - len(kept)]
    winter = labels.recognise([*extra, *kept])
    assert winter.name == "winter21" and list(winter.classes) == sorted([*extra, *kept])
    for name in ("imagenet1k", "imagenet12k", "imagenet21k-p-winter21", "imagenet21k-p-fall11"):
        found = labels.recognise(labels.class_list(name))
        assert found == labels.Release(name, labels.class_list(name))
    assert labels.recognise(["n2", "n1"]) == labels.Release("custom", ("n1", "n2"))


@pytest.mark.parametrize("name", ["imagenet22k", "imagenet1k", "imagenet12k"])
def test_an_incomplete_download_is_not_taken_for_a_release_of_its_own(name):
    classes = labels.class_list(name)
    with pytest.raises(UserError, match=f"1 missing.*{classes[5]}"):
        labels.recognise(classes[:5] + classes[6:])


def test_names_and_descriptions():
    info = ImageNetInfo("imagenet-22k")
    names, texts = (
        f(labels.class_list("imagenet22k")) for f in (labels.class_names, labels.class_descriptions)
    )
    for row in range(0, 21841, 997):
        assert names[row] == info.index_to_description(row)
        assert f"{names[row]}: {texts[row]}" == info.index_to_description(row, detailed=True)
    assert labels.class_names(["n00000000"]) == ("n00000000",)


def test_hashes_must_agree():
    one, other = class_hash(["a", "b"]), class_hash(["b", "a"])
    assert one != other
    labels.require_same(one, one, what="x")
    with pytest.raises(UserError, match="checkpoint and manifest"):
        labels.require_same(one, other, what="checkpoint and manifest")


def test_the_evaluation_sets_choose_among_the_1k_classes():
    known = set(labels.class_list("imagenet1k"))
    for name in ("imagenet-a", "imagenet-r"):
        table = labels.evaluation_classes(name)
        assert len(table) == 200 and set(table) < known and list(table) == sorted(table)
    real = labels.real_labels()
    assert len(real) == 50_000 and max(row for rows in real for row in rows) == 999
    assert labels.usual_classes(1000) == labels.class_list("imagenet1k")
    assert labels.usual_classes(10) == ()
    assert labels.known_names(["n01440764"]) == ("tench, Tinca tinca",)
    assert labels.known_names(["n01440764", "mine"]) == ()
