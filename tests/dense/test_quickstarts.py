"""The quickstarts of detection and segmentation, and the programs on what they trained."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from finetune import dense, detect, sample_scenes, segment
from finetune.train import main as train
from l2vit import config as configuration
from l2vit.dense.drawing import colours
from l2vit.errors import UserError
from l2vit.train import dense_weights, detection
from l2vit.train.dense_config import DetectConfig


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    sample_scenes.main(["--out", str(folder), "--images", "4"])
    return folder


def run(config, out, *changes):
    assert train(["--config", f"finetune/configs/{config}.yaml", f"run.dir={out}", *changes]) == 0


def pixels(path):
    return np.array(Image.open(path)).astype(np.int64)


# -- segmentation


@pytest.fixture(scope="module")
def segmentor(scenes, tmp_path_factory):
    """The run of the quickstart, shortened."""
    ade, out = scenes / "ade", tmp_path_factory.mktemp("segment") / "run"
    places = [f"data.root={ade}", "data.threads=0"]
    for kind, folder in (("images", "images"), ("labels", "annotations")):
        places.append(f"data.val_{kind}={ade / folder / 'training'}")
    run("quickstart_segment", out, *places, "schedule.length=40 steps")
    return out


def test_segmentation_learns_its_pictures(segmentor, scenes, tmp_path):
    """Figures of the label maps that ``--save-labels`` wrote, counted by plain numpy."""
    options = ["evaluate", "--model", str(segmentor), "--out", str(tmp_path), "--save-labels"]
    assert segment.main(options) == 0
    told = json.loads((tmp_path / "metrics.json").read_text())
    truths = sorted((scenes / "ade/annotations/training").iterdir())
    truth = np.concatenate([pixels(path).ravel() for path in truths])
    found = np.concatenate([pixels(tmp_path / path.name).ravel() for path in truths])
    truth, found = truth[truth > 0], found[truth > 0]
    assert found.min() >= 1 and found.max() <= 10
    overlap = {
        k: ((truth == k) & (found == k)).sum() / ((truth == k) | (found == k)).sum()
        for k in range(1, 11)
        if ((truth == k) | (found == k)).any()
    }
    figures = told["figures"]
    assert figures["mIoU"] == pytest.approx(np.mean(list(overlap.values())), rel=1e-12)
    recalls = [(found[truth == k] == k).mean() for k in np.unique(truth)]
    assert figures["mAcc"] == pytest.approx(np.mean(recalls), rel=1e-12)
    assert figures["aAcc"] == pytest.approx((truth == found).mean(), rel=1e-12)
    known = {int(name): iou for name, iou in told["per_class"].items() if iou >= 0}
    assert known == pytest.approx(overlap)
    assert figures["mIoU"] >= 0.9


def test_segmentations_are_drawn(segmentor, scenes, tmp_path):
    """A digit's pixels are half the picture, half the colour of its class."""
    images = scenes / "ade/images/training"
    options = ["predict", "--model", str(segmentor), "--images", str(images)]
    assert segment.main([*options, "--out", str(tmp_path)]) == 0
    drawn = sorted(tmp_path.iterdir())
    assert [path.name[6:] for path in drawn] == [path.name for path in sorted(images.iterdir())]
    right = []
    for path in drawn:
        labels = pixels(scenes / "ade/annotations/training" / path.name[6:])
        picture, answer = pixels(images / path.name[6:]), pixels(path)
        for k in np.unique(labels[labels > 0]):
            tint = 2 * answer[labels == k] - picture[labels == k]
            right.append((abs(tint - np.array(colours(10)[k - 1])) <= 1).all(axis=1))
    assert np.concatenate(right).mean() > 0.9


@pytest.mark.ci
def test_a_segmentor_leaves_as_onnx(segmentor, tmp_path, capfd):
    """onnxruntime on two pictures against the model's own answer before its last step."""
    command = ["export", "--model", str(segmentor), "--out", str(tmp_path / "export")]
    assert segment.main([*command, "--onnx", "64x96"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "export" / "model.onnx")
    pictures = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    [logits] = session.run(None, {"images": pictures.numpy()})
    model = dense.build(dense.read(segmentor, "segment"), torch.device("cpu"))
    model.short_side, model.mode = 64, "whole"
    with torch.no_grad():
        expected = torch.stack(model(list(pictures)))
    assert logits.shape[2:] == (64, 96)
    assert (torch.from_numpy(logits).argmax(1) == expected).float().mean() > 0.999
    certificate = json.loads((tmp_path / "export" / "certificate.json").read_text())
    assert "model.onnx" in certificate["sha256"]
    for size in ("64", "60x96", "0x0"):
        assert segment.main([*command, "--onnx", size]) == 2
    assert "must divide by 32" in capfd.readouterr().err


def test_an_exported_segmentor_answers_the_same_in_a_fresh_process(segmentor, scenes, tmp_path):
    out = tmp_path / "export"
    assert segment.main(["export", "--model", str(segmentor), "--out", str(out)]) == 0
    proof = json.loads((out / "certificate.json").read_text())["proof"]
    assert proof == {"pictures": 2, "largest_difference": 0.0, "tensors": 2}
    given, again = (dense.read(path, "segment") for path in (segmentor, out))
    assert given.classes == again.classes and given.settings == again.settings
    assert all(torch.equal(given.weights[name], again.weights[name]) for name in given.weights)
    assert "mIoU" in (out / "README.md").read_text()
    assert detect.main(["export", "--model", str(out), "--out", str(tmp_path / "x")]) == 1


# -- detection


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """An untrained Mask R-CNN of the ten digits as an export, not yet proven."""
    tree = {
        "model": {"name": "l2vit_mini", "fpn_channels": 16, "box_width": 32, "mask_convs": 1},
        "run": {"dir": "runs/x"},
        "schedule": {"global_batch": 4},
        "eval": {"short_side": 128, "long_side": 160},
    }
    settings = configuration.from_tree(DetectConfig, tree)
    names = tuple(f"digit {k}" for k in range(10))
    torch.manual_seed(0)
    weights = detection.make_network(settings, 10).state_dict()
    return dense_weights.DenseWeights(
        tmp_path_factory.mktemp("none"),
        "detect",
        configuration.to_tree(settings),
        weights,
        "raw",
        names,
    )


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory):
    out = tmp_path_factory.mktemp("detect") / "export"
    dense.export(detector, out)
    return out


def plain_figures(truth, results, kind):
    """pycocotools' twelve figures of a results file."""
    data = COCO(truth)
    scores = COCOeval(data, data.loadRes(str(results)), kind)
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    return scores.stats.tolist()


def test_an_exported_detector_answers_the_same_in_a_fresh_process(detector, exported):
    proof = json.loads((exported / "certificate.json").read_text())["proof"]
    assert proof["pictures"] == 2 and proof["largest_difference"] < 1e-3
    assert proof["tensors"] == 2 * 4  # boxes, labels, scores and masks
    pictures = [torch.randint(256, (3, 96, 120), dtype=torch.uint8)]
    found = dict(dense.answers(dense.build(detector, torch.device("cpu")), "detect", pictures))
    assert len(found["0/boxes"]) == 100, "nothing would be compared"


def test_an_export_that_answers_otherwise_is_no_export(detector, tmp_path, monkeypatch):
    def other(directory, pictures):
        model = dense.build(dense.read(directory, "detect"), torch.device("cpu"))
        found = dict(dense.answers(model, "detect", pictures))
        return found | {"0/scores": found["0/scores"] + 0.01}

    monkeypatch.setattr(dense, "fresh_answers", other)
    with pytest.raises(UserError, match=r"a fresh process differs by 0\.01"):
        dense.export(detector, tmp_path)
    assert not (tmp_path / "certificate.json").exists()


def evaluated(exported, scenes, truth, out):
    options = ["evaluate", "--model", str(exported), "--data", str(truth)]
    options += ["--images", str(scenes / "coco/train2017"), "--out", str(out)]
    assert detect.main(options) == 0
    return json.loads((out / "metrics.json").read_text())


def test_results_files_through_plain_pycocotools_give_our_figures(exported, scenes, tmp_path):
    """The truth is every tenth answer of the detector, its box two pixels wider."""
    data = json.loads((scenes / "coco/annotations/instances_train2017.json").read_text())
    evaluated(exported, scenes, scenes / "coco/annotations/instances_train2017.json", tmp_path)
    entries = json.loads((tmp_path / "segm.json").read_text())[::10]
    boxes = json.loads((tmp_path / "bbox.json").read_text())[::10]
    data["annotations"] = [
        {
            "id": number,
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "segmentation": entry["segmentation"],
            "bbox": [*other["bbox"][:2], other["bbox"][2] + 2, other["bbox"][3]],
            "area": other["bbox"][2] * other["bbox"][3],
            "iscrowd": 0,
        }
        for number, (entry, other) in enumerate(zip(entries, boxes, strict=True), start=1)
    ]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(data))
    told = evaluated(exported, scenes, truth, tmp_path)
    ours = list(told["figures"].values())
    assert ours[:12] == plain_figures(truth, tmp_path / "bbox.json", "bbox")
    assert ours[12:] == plain_figures(truth, tmp_path / "segm.json", "segm")
    assert 0.05 < min(ours[0], ours[12]) < max(ours[0], ours[12]) < 1
    assert set(told["per_class"]["segm"]) == {f"digit {k}" for k in range(10)}
    assert np.unique(pixels(tmp_path / "curves.png")[..., :3]).size > 10


def test_detections_are_drawn(exported, scenes, tmp_path):
    images = scenes / "coco/train2017"
    options = ["predict", "--model", str(exported), "--images", str(images), "--least", "0.05"]
    assert detect.main([*options, "--out", str(tmp_path)]) == 0
    listed = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["picture"] for entry in listed} == {str(p) for p in images.iterdir()}
    for number, path in enumerate(sorted(images.iterdir())):
        drawn, picture = pixels(tmp_path / f"{number:05d}-{path.stem}.png"), pixels(path)
        assert drawn.shape == picture.shape and (drawn != picture).any()


def quickstart_places(scenes):
    coco = scenes / "coco"
    truth = coco / "annotations/instances_train2017.json"
    places = [f"data.root={coco}", f"data.val_images={coco / 'train2017'}", "data.threads=0"]
    return [*places, f"data.val_json={truth}"], truth


@pytest.mark.ci
def test_detection_learns_its_pictures(scenes, tmp_path):
    """About 50 CPU-seconds: the step alone takes 0.22."""
    places, truth = quickstart_places(scenes)
    run("quickstart_detect", tmp_path / "run", *places)
    out = tmp_path / "out"
    assert detect.main(["evaluate", "--model", str(tmp_path / "run"), "--out", str(out)]) == 0
    figures = json.loads((out / "metrics.json").read_text())["figures"]
    assert list(figures.values()) == plain_figures(truth, out / "bbox.json", "bbox")
    assert figures["bbox_AP"] >= 0.9


@pytest.mark.slow
def test_mask_rcnn_learns_its_pictures(scenes, tmp_path):
    """About four CPU-minutes."""
    places, _ = quickstart_places(scenes)
    changes = ["model.head=mask_rcnn", "model.box_width=128", "model.mask_convs=2"]
    changes += ["schedule.length=250 steps", "schedule.steps=[200 steps]"]
    run("quickstart_detect", tmp_path / "run", *places, *changes)
    out = tmp_path / "out"
    assert detect.main(["evaluate", "--model", str(tmp_path / "run"), "--out", str(out)]) == 0
    figures = json.loads((out / "metrics.json").read_text())["figures"]
    assert figures["segm_AP"] >= 0.6


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
