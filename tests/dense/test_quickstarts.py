"""The quickstarts of detection and segmentation: a few made scenes learned by heart."""

import json

import pytest

from finetune import detect, sample_scenes, segment
from finetune.train import main as train


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    sample_scenes.main(["--out", str(folder), "--images", "4"])
    return folder


def run(config, out, *changes):
    assert train(["--config", f"finetune/configs/{config}.yaml", f"run.dir={out}", *changes]) == 0


def test_segmentation_learns_its_pictures(scenes, tmp_path):
    ade = scenes / "ade"
    places = [f"data.root={ade}", "data.threads=0"]
    for kind, folder in (("images", "images"), ("labels", "annotations")):
        places.append(f"data.val_{kind}={ade / folder / 'training'}")
    run("quickstart_segment", tmp_path / "run", *places, "schedule.length=40 steps")
    assert segment.main(["evaluate", "--model", str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["figures"]["mIoU"] >= 0.9


@pytest.mark.slow
def test_detection_learns_its_pictures(scenes, tmp_path):
    coco = scenes / "coco"
    places = [f"data.root={coco}", f"data.val_images={coco / 'train2017'}", "data.threads=0"]
    places.append(f"data.val_json={coco / 'annotations' / 'instances_train2017.json'}")
    run("quickstart_detect", tmp_path / "run", *places)
    out = tmp_path / "out"
    assert detect.main(["evaluate", "--model", str(tmp_path / "run"), "--out", str(out)]) == 0
    figures = json.loads((out / "metrics.json").read_text())["figures"]
    assert figures["bbox_AP"] >= 0.9


@pytest.mark.parametrize(
    ("program", "recipe", "parameters"),
    [
        (detect, "coco_retinanet_tiny_1x", 38_767_033),
        (detect, "coco_mask_rcnn_base_3x", 107_955_121),
        (segment, "ade20k_upernet_small_160k", 81_852_665),
    ],
)
def test_describe_prints_one_line_of_json(program, recipe, parameters, capsys):
    arguments = ["--config", f"finetune/configs/{recipe}.yaml", "--json", "-"]
    assert program.main(["describe", *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == parameters and told["multiply_adds"] > 0 and told["parts"]


def test_flatten_swin_takes_detection_sizes_in_windows_as_trained(capsys):
    """FLatten's Table 4: 49 M and 268 G, which windows as trained and padding give."""
    arguments = ["--config", "finetune/configs/coco_mask_rcnn_tiny_1x.yaml", "--json", "-"]
    arguments += ["model.name=flatten_swin_tiny", "model.args={dynamic: true}"]
    assert detect.main(["describe", *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert round(told["parameters"] / 1e5) == 487
    assert round(told["multiply_adds"] / 1e8) == 2684
