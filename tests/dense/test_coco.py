"""COCO-style annotations against pycocotools, hostile ones against one line."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from finetune import sample_scenes
from l2vit.dense.coco import CocoSet, read_annotations, results, score
from l2vit.errors import UserError


def read(root):
    return CocoSet.read(root / "coco/annotations/instances_train2017.json", root / "coco/train2017")


def test_boxes_labels_and_masks_are_those_of_pycocotools(scenes):
    ours, theirs = read(scenes), COCO(scenes / "coco/annotations/instances_train2017.json")
    assert ours.names == tuple(f"digit {k}" for k in range(10))
    crowds = 0
    for number, image_id in enumerate(ours.image_ids.tolist()):
        found = ours.target(number, masks=True)
        entries = theirs.loadAnns(theirs.getAnnIds([image_id], iscrowd=False))
        crowds += len(theirs.getAnnIds([image_id], iscrowd=True))
        assert len(found["boxes"]) == len(entries)
        for box, label, mask, entry in zip(*found.values(), entries, strict=True):
            x, y, w, h = entry["bbox"]
            assert box.tolist() == [x, y, x + w, y + h]
            assert int(label) == entry["category_id"] - 1
            assert np.array_equal(mask.numpy(), theirs.annToMask(entry))
    assert crowds == 1 and ours.left_out.counts == {"of crowds": 1}


def test_scenes_are_what_they_claim(scenes):
    """Polygons and run lengths cover the same pixels; label maps agree with the masks."""
    made = sample_scenes.make_scenes(8)
    ours = read(scenes)
    portraits = 0
    for number, scene in enumerate(made):
        found = ours.target(number, masks=True)
        keep = len(scene.digits) - scene.crowd
        assert found["labels"].tolist() == scene.digits[:keep]
        for mask, truth in zip(found["masks"], scene.masks[:keep], strict=True):
            assert np.array_equal(mask.numpy().astype(bool), truth)
        labels = np.array(Image.open(scenes / f"ade/annotations/training/{number + 1:08d}.png"))
        expected = np.zeros_like(labels)
        for digit, mask in zip(scene.digits, scene.masks, strict=True):
            expected[mask] = digit + 1
        assert np.array_equal(labels, expected)
        portraits += scene.pixels.shape[0] > scene.pixels.shape[1]
    assert portraits == 4 and not made[2].digits and made[3].crowd


def test_pictures_without_annotation_or_too_small_are_not_trained_on(scenes):
    ours = read(scenes)
    assert ours.trainable().tolist() == [0, 1, 3, 4, 5, 6, 7]  # the third has no digit
    ours.sizes[4] = torch.tensor([31, 160])
    assert ours.trainable().tolist() == [0, 1, 3, 5, 6, 7]
    assert ours.landscape().tolist()[:2] == [True, False]


@pytest.fixture
def good(scenes, tmp_path):
    """Annotations to spoil, and where to write them."""
    path = scenes / "coco/annotations/instances_train2017.json"
    data = json.loads(path.read_text())

    def spoilt(change):
        changed = copy.deepcopy(data)
        change(changed)
        (tmp_path / "bad.json").write_text(json.dumps(changed))
        return CocoSet.read(tmp_path / "bad.json", scenes / "coco/train2017")

    return spoilt


def put(where, place, key, value):
    def change(data):
        data[where][place][key] = value

    return change


HOSTILE = {
    "missing file": (put("images", 1, "file_name", "no.png"), "image 2: no file"),
    "unknown category": (
        put("annotations", 2, "category_id", 99),
        "annotation 3: category_id 99 is not among the categories",
    ),
    "unknown image": (put("annotations", 2, "image_id", 77), "annotation 3: image_id 77 is not"),
    "float category": (put("annotations", 2, "category_id", 3.5), "annotation 3: category_id 3.5"),
    "float category id": (put("categories", 2, "id", 3.0), "categories[2]: id 3.0"),
    "duplicate annotation": (put("annotations", 2, "id", 1), "annotation id 1 is there twice"),
    "duplicate image": (put("images", 2, "id", 1), "images[2]: image id 1 is there twice"),
    "duplicate category": (put("categories", 2, "id", 1), "category id 1 is there twice"),
    "duplicate name": (put("categories", 2, "name", "digit 1"), "category 3: called 'digit 1'"),
    "box of three": (put("annotations", 2, "bbox", [1, 2, 3]), "annotation 3: bbox [1, 2, 3]"),
    "box of words": (put("annotations", 2, "bbox", ["a", 2, 3, 4]), "annotation 3: bbox"),
    "box not finite": (put("annotations", 2, "bbox", [1, 2, float("nan"), 4]), "annotation 3"),
    "no height": (put("images", 1, "height", None), "image 2: height None"),
    "no annotations": (lambda d: d.update(annotations=[]), "annotations is empty"),
    "no list": (lambda d: d.pop("images"), "images is missing or no list"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_annotations_end_in_one_line_that_names_the_entry(good, case):
    change, line = HOSTILE[case]
    with pytest.raises(UserError) as caught:
        good(change)
    text = str(caught.value)
    assert line in text and "bad.json" in text and "\n" not in text


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([500, 10, 20, 20], "outside of their picture"),
        ([-30, 10, 20, 20], "outside of their picture"),
        ([10, 10, 0, 20], "with less than a pixel"),
        ([10, 10, 20, 0.5], "with less than a pixel"),
        ([10, 10, -5, 20], "with less than a pixel"),
    ],
)
def test_unusable_boxes_are_left_out_with_a_line_that_names_the_first(good, box, reason):
    """COCO itself has some, so they are no error."""
    found = good(put("annotations", 0, "bbox", box))
    [line] = [line for line in found.left_out.lines() if reason in line]
    assert line.startswith("1 boxes left out") and "annotation 1 of image 1" in line


def test_boxes_that_reach_outside_are_cut(good):
    found = good(put("annotations", 0, "bbox", [-5.5, 100, 40, 90]))
    assert found.target(0, masks=False)["boxes"][0].tolist() == [0, 100, 34.5, 128]


@pytest.mark.parametrize(
    "shape", [[], [[1, 2, 3]], {"size": [5, 5], "counts": [25]}, {"counts": "x"}, "no"]
)
def test_unreadable_segmentations_name_the_annotation(good, shape):
    found = good(put("annotations", 0, "segmentation", shape))
    with pytest.raises(UserError, match="annotation 1: segmentation cannot be read"):
        found.target(0, masks=True)
    assert len(found.target(0, masks=False)["boxes"])


def test_a_json_that_is_none_is_named(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"a\.json: expected an object"):
        read_annotations(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json cannot be read"):
        read_annotations(tmp_path / "a.json")


def detections(ours, noise=0.0, masks=True):
    """The truth as a model's answers, moved by noise."""
    generator = torch.Generator().manual_seed(0)
    listed = []
    for number, image_id in enumerate(ours.image_ids.tolist()):
        found = ours.target(number, masks=masks)
        found["boxes"] += noise * torch.randn(found["boxes"].shape, generator=generator)
        if masks:
            shift = int(noise > 0)
            found["masks"] = found["masks"].roll(shift, dims=-1).bool()
        found["scores"] = torch.rand(len(found["boxes"]), generator=generator)
        listed += results(image_id, found, ours.categories)
    return listed


def test_the_truth_scores_one(scenes):
    ours = read(scenes)
    data = read_annotations(ours.path)
    for kind in ("bbox", "segm"):
        found = score(data, detections(ours), kind)
        assert found.figures["AP"] == pytest.approx(1.0)
        present = {
            k for n in range(len(ours)) for k in ours.target(n, masks=False)["labels"].tolist()
        }
        ones = {name for name, value in found.per_class.items() if value > 0.999}
        assert ones == {f"digit {k}" for k in present}
        assert found.precision.shape == (10, 101) and found.precision.min() > 0.999


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_are_those_of_plain_pycocotools(scenes, tmp_path, kind):
    ours = read(scenes)
    listed = detections(ours, noise=3.0)
    found = score(read_annotations(ours.path), listed, kind)
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    plain = [{k: v for k, v in entry.items() if k != other} for entry in listed]
    (tmp_path / "results.json").write_text(json.dumps(plain))
    truth = COCO(ours.path)
    judge = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), kind)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert list(found.figures.values()) == judge.stats.tolist()
    assert 0.05 < found.figures["AP"] < 0.95


def test_no_detection_at_all_scores_zero(scenes):
    found = score(read_annotations(read(scenes).path), [], "bbox")
    assert found.figures["AP"] == 0.0 and found.figures["AR_100"] == 0.0
