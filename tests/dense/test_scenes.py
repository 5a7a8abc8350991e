"""Label maps in ADE20K's form, and what is wrong with others."""

import numpy as np
import pytest
import torch
from PIL import Image

from l2vit.dense.config import ScenesConfig
from l2vit.dense.scenes import SceneSet, class_names
from l2vit.dense.transforms import IGNORED
from l2vit.errors import ConfigError, UserError


def read(scenes, classes=10, zero_is_other=True):
    images, labels = ScenesConfig(root=str(scenes / "ade")).places("training")
    return SceneSet.read(images, labels, classes=classes, zero_is_other=zero_is_other)


def test_other_becomes_ignored_and_classes_count_from_zero(scenes):
    found = read(scenes)
    assert len(found) == 8
    raw = np.array(Image.open(found.labels[0])).astype(int)
    expected = np.where(raw == 0, IGNORED, raw - 1)
    assert np.array_equal(found.label_map(0).numpy(), expected)
    assert found.pictures[0].stem == found.labels[0].stem


def test_other_folders_count_from_zero_themselves(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "a/x.jpg")
    Image.fromarray(np.array([[0, 1, 255, 2]] * 3, np.uint8)).save(tmp_path / "b/x.png")
    found = SceneSet.read(tmp_path / "a", tmp_path / "b", classes=3, zero_is_other=False)
    assert found.label_map(0)[0].tolist() == [0, 1, 255, 2]
    small = SceneSet.read(tmp_path / "a", tmp_path / "b", classes=2, zero_is_other=False)
    with pytest.raises(UserError, match=r"x\.png: label 2 is of none of 2 classes"):
        small.label_map(0)
    shifted = SceneSet.read(tmp_path / "a", tmp_path / "b", classes=2, zero_is_other=True)
    assert shifted.label_map(0)[0].tolist() == [IGNORED, 0, IGNORED, 1]
    assert torch.equal(shifted.label_map(0), shifted.label_map(0))


def test_what_is_missing_is_named(scenes, tmp_path):
    with pytest.raises(UserError, match="no directory at"):
        SceneSet.read(tmp_path / "no", tmp_path, classes=3, zero_is_other=True)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="no pictures in"):
        SceneSet.read(tmp_path / "images", tmp_path, classes=3, zero_is_other=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images/lonely.jpg")
    with pytest.raises(UserError, match=r"lonely\.jpg has no label map"):
        SceneSet.read(tmp_path / "images", tmp_path, classes=3, zero_is_other=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "lonely.png")
    found = SceneSet.read(tmp_path / "images", tmp_path, classes=3, zero_is_other=True)
    with pytest.raises(UserError, match="not one value a pixel"):
        found.label_map(0)
    with pytest.raises(ConfigError, match=r"data\.root, or data\.train_images"):
        ScenesConfig().places("training")


def test_names_come_from_ade20ks_list(tmp_path):
    head = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    (tmp_path / "objectInfo150.txt").write_text(
        head + "1\t0.1\t2\t3\t1\twall\n2\t0.1\t2\t3\t1\tbuilding, edifice\n"
    )
    assert class_names(tmp_path, 2) == ("wall", "building")
    assert class_names(tmp_path, 3) == ("1", "2", "3")
    assert class_names(None, 2) == ("1", "2")
