"""timm's own reader on a built data set, from its root and by timm's names of parts."""

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from data_prep.__main__ import main


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(3)
    for part, count in (("train", 12), ("val", 4)):
        for number in range(count):
            path = root / "raw" / part / f"c{number % 2}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    arguments = ["build", "--dataset", "folder", "--source", str(root / "raw")]
    assert main([*arguments, "--out", str(root / "out"), "--workers", "1"]) == 0
    return root / "out"


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("val", 4), ("validation", 4)])
def test_every_part_is_read_from_the_root(built, split, count):
    dataset = create_dataset("wds/", root=str(built), split=split, is_training=False, batch_size=2)
    samples = list(dataset)
    assert len(samples) == count
    assert sorted(label for _, label in samples) == [0] * (count // 2) + [1] * (count // 2)


def test_a_finished_build_gets_its_description_back(built):
    (built / "_info.json").unlink()
    arguments = ["build", "--dataset", "folder", "--source", str(built.parent / "raw")]
    assert main([*arguments, "--out", str(built), "--workers", "1"]) == 0
    assert (built / "_info.json").is_file()
