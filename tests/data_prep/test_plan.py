"""Planning in many small runs is planning in one, and takes no memory for it."""

import itertools
import tracemalloc

import numpy as np
import pytest
from raw_archives import class_members, encoded, jpeg, picture, tar_bytes, zipped
from shard_contents import lines, tree

import data_prep.catalogue
import data_prep.spill
from data_prep.options import Options
from data_prep.plan import make_plan
from data_prep.records import RECORD, UnitResult, Workspace
from data_prep.sources import Unit
from data_prep.spill import Spill


@pytest.mark.parametrize("run", [1, 7, 64, 10_000])
def test_runs_are_a_stable_sort(run, tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep.spill, "RUN", run)
    rng = np.random.default_rng(run)
    records = np.zeros(3000, [("key", "<u8"), ("number", "<u4")])
    records["key"] = rng.integers(0, 2**64, 3000, dtype=np.uint64)
    records["key"][::5] = records["key"][0]  # equal keys keep their order
    records["number"] = np.arange(3000)
    spill = Spill(tmp_path / "s", records.dtype, "key", len(records))
    for start in range(0, 3000, 700):
        spill.add(records[start : start + 700])
    for _ in range(2):  # as often as one likes
        runs = list(spill.runs())
        expected = records[np.argsort(records["key"], kind="stable")]
        np.testing.assert_array_equal(np.concatenate(runs), expected)
        for before, after in itertools.pairwise(runs):
            assert not len(np.intersect1d(before["key"], after["key"]))
    spill.delete()
    assert not (tmp_path / "s").exists()


def messy_release(path):
    """Copies within and across classes, keys that clash, repairs, an image to exclude."""
    shared = jpeg(1)
    classes = {
        f"n9100000{c}": [jpeg(100 * c + i) for i in range(12)]
        + [jpeg(100 * c), shared, zipped(jpeg(5000 + c)), encoded(picture(6000 + c), "PNG")]
        for c in range(4)
    }
    members = [(f"{w}.tar", tar_bytes(class_members(w, images))) for w, images in classes.items()]
    clash = [("n9.JPEG", jpeg(7001)), ("n9.jpg", jpeg(7002)), ("n9.png", jpeg(7003))]
    path.write_bytes(tar_bytes([*members, ("n91000009.tar", tar_bytes(clash))]))
    (path.parent / "guard").mkdir()
    for number in (3, 104, 5001):
        (path.parent / f"guard/{number}.jpg").write_bytes(jpeg(number))
    (path.parent / "guard/near.jpg").write_bytes(jpeg(210, quality=60))


RULES = [
    ("--split", "both", "--val-fraction", 0.3),
    ("--split", "both", "--val-per-class", 3),
    ("--split", "val", "--val-first-per-class", 2),
    ("--min-class-images", 4, "--gather"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[-2])
def test_many_small_runs_change_no_byte(rule, tmp_path, run, monkeypatch):
    messy_release(tmp_path / "raw.tar")
    words = ("build", "--dataset", "imagenet22k", "--source", tmp_path / "raw.tar", "--workers", 1)
    guard = ("--exclude", tmp_path / "guard", "--exclude-distance", 3, "--shard-samples", 9)
    assert run(*words, *rule, *guard, "--out", tmp_path / "one") == 0
    monkeypatch.setattr(data_prep.spill, "RUN", 4)
    monkeypatch.setattr(data_prep.catalogue, "CHUNK", 5)
    assert run(*words, *rule, *guard, "--out", tmp_path / "many") == 0
    assert tree(tmp_path / "many").keys() == tree(tmp_path / "one").keys()
    for name, digest in tree(tmp_path / "one").items():
        if not name.endswith("manifest.json"):
            assert tree(tmp_path / "many")[name] == digest, name
    found = {
        event["reason"]
        for path in (tmp_path / "many").rglob("rejected.jsonl")
        for event in lines(path)
    }
    assert {"excluded-exact", "excluded-near", "duplicate", "duplicate-across-classes"} <= found


def test_memory_grows_by_a_few_bytes_an_image(tmp_path, monkeypatch):
    """300,000 records are 25 MB; planned in runs of 16,384 they take a fraction of it."""
    monkeypatch.setattr(data_prep.spill, "RUN", 1 << 14)
    monkeypatch.setattr(data_prep.catalogue, "CHUNK", 1 << 14)
    workspace = Workspace(tmp_path / ".build")
    workspace.create()
    rng = np.random.default_rng(0)
    units = []
    for number in range(30):
        records = np.zeros(10_000, RECORD)
        for name in ("rank", "sha_high", "sha_low"):
            records[name] = rng.integers(0, 2**64, len(records), dtype=np.uint64)
        records["size"], records["unit"], records["label"] = 40_000, number, number
        records["row"] = np.arange(len(records))
        text = [f"k{number}_{row}\tname".encode() for row in range(len(records))]
        lengths = np.array([len(line) for line in text])
        records["text_size"], records["text_offset"] = lengths, np.cumsum(lengths) - lengths
        result = UnitResult(records, b"".join(text), [], len(records), {"jpeg": len(records)})
        result.save(workspace.unit_result(number))
        units.append(Unit(number, "tar", "none", "none", f"n{number:08d}"))
    options = Options("imagenet22k", (), tmp_path, split="both", val_fraction=0.1)
    classes = tuple(unit.class_id for unit in units)
    tracemalloc.start()
    plan = make_plan(options, workspace, units, classes, ("train", "val"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000 * RECORD.itemsize / 3
    orders = {part: np.load(workspace.order(part)) for part in ("train", "val")}
    assert sum(map(len, orders.values())) == 300_000
    assert 28_000 < len(orders["val"]) < 32_000
    for part, order in orders.items():
        assert (np.diff(order["rank"].astype(object)) > 0).all()
        assert sum(plan.about[part]["class_counts"]) == len(order)
        bounds = np.load(workspace.bounds(part))
        assert bounds[-1] == len(order) and len(bounds) == plan.shards[part] + 1
