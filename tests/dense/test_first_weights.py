"""``init.source`` of detectors and segmentors: from a classifier, and from another of its kind."""

import json

import pytest
import safetensors.torch
import timm
import torch

from l2vit import config
from l2vit.errors import UserError
from l2vit.train import dense_weights, detection, segmentation
from l2vit.train.config import InitConfig
from l2vit.train.dense_config import DetectConfig, SegmentConfig

OLD = ("cat", "dog", "cow")
NEW = ("zebra", "cow", "cat")
SHARED = {1: 2, 2: 0}
"""Place in NEW: place in OLD."""


def settings(head, **model):
    kind, width = (
        (SegmentConfig, {"head_channels": 16, "auxiliary_channels": 8, "head_norm": "batch"})
        if head == "upernet"
        else (DetectConfig, {"fpn_channels": 16, "box_width": 32, "mask_convs": 1})
        if head == "mask_rcnn"
        else (DetectConfig, {"fpn_channels": 16})
    )
    tree = {
        "model": {"name": "l2vit_mini", "head": head, **width, **model},
        "run": {"dir": "runs/x"},
        "schedule": {"global_batch": 4},
    }
    return config.from_tree(kind, tree)


def network(head, classes):
    chosen = settings(head)
    make = segmentation.make_network if head == "upernet" else detection.make_network
    return make(chosen, len(classes))


def save(folder, head, classes):
    """A detector or segmentor with weights unlike any fresh one's, as an export holds it."""
    torch.manual_seed(1)
    model = network(head, classes)
    weights = {
        name: t + torch.rand_like(t) if t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }
    source = dense_weights.DenseWeights(
        folder,
        "segment" if head == "upernet" else "detect",
        config.to_tree(settings(head)),
        weights,
        "raw",
        classes,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dense_weights.export_record(source)))
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return weights


def start(kind, source, classes, **init):
    """(report, weights before, weights after) of a start from ``source``."""
    torch.manual_seed(2)
    model = network(kind, classes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = dense_weights.load_initial(
        model, InitConfig(str(source), **init), model=settings(kind).model, classes=classes
    )
    return report, before, model.state_dict()


def rows(head, name, k, classes):
    """Rows of output tensor ``name`` that belong to class ``k``; background: k = -1."""
    if "cls_logits" in name:  # nine anchors, each with all classes
        return [anchor * len(classes) + k for anchor in range(9)]
    if "bbox_pred" in name:  # four numbers each
        return range(4 * (1 + k), 4 * (2 + k))
    return [k if head == "upernet" else 1 + k]


OUTPUTS = {
    "retinanet": ("head.classification_head.cls_logits",),
    "mask_rcnn": (
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    ),
    "upernet": ("head.1", "auxiliary.4"),
}


@pytest.mark.parametrize("head", OUTPUTS)
def test_class_outputs_follow_their_names(head, tmp_path):
    given = save(tmp_path / "old", head, OLD)
    report, before, after = start(head, tmp_path / "old", NEW)
    outputs = {f"{name}.{kind}" for name in OUTPUTS[head] for kind in ("weight", "bias")}
    assert {t.name for t in report.tensors if t.fate == "sliced"} == outputs
    for name, tensor in after.items():
        if name not in outputs:
            assert torch.equal(tensor, given[name]), name
            continue
        background = [] if head in ("retinanet", "upernet") else [-1]
        for k in [*background, *range(len(NEW))]:
            new = tensor[rows(head, name, k, NEW)]
            if k == 0:
                assert torch.equal(new, before[name][rows(head, name, k, NEW)]), name
            else:
                old = rows(head, name, SHARED.get(k, -1), OLD)
                assert torch.equal(new, given[name][old]), (name, k)


def test_what_init_head_asks_for(tmp_path):
    given = save(tmp_path / "old", "retinanet", OLD)
    name = "head.classification_head.cls_logits.weight"
    _, before, after = start("retinanet", tmp_path / "old", OLD, head="fresh")
    assert torch.equal(after[name], before[name])
    _, _, after = start("retinanet", tmp_path / "old", OLD, head="keep")
    assert torch.equal(after[name], given[name])
    with pytest.raises(UserError, match=r"init\.head=keep, but the classes of .*old are not"):
        start("retinanet", tmp_path / "old", NEW, head="keep")
    with pytest.raises(UserError, match=r"init\.head=slice, but .*old knows none"):
        start("retinanet", tmp_path / "old", ("x", "y"), head="slice")


def test_another_kind_of_head_is_refused_in_one_line(tmp_path):
    save(tmp_path / "old", "upernet", OLD)
    with pytest.raises(UserError, match=r"old is a upernet, this run a retinanet") as caught:
        start("retinanet", tmp_path / "old", OLD)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier that differs from any fresh one, and timm's own export of it."""
    torch.manual_seed(3)
    model = timm.create_model("l2vit_mini", num_classes=5, window_size=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("timm")
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return model, folder


@pytest.mark.parametrize("head", OUTPUTS)
def test_a_classifier_gives_its_backbone(head, classifier):
    """The maps are those of timm's ``forward_intermediates``; all else is as initialised."""
    source, folder = classifier
    torch.manual_seed(2)
    model = network(head, OLD)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = settings(head).model
    report = dense_weights.load_initial(model, InitConfig(str(folder)), model=chosen, classes=OLD)
    levels = model.levels if head == "upernet" else model.backbone.levels
    images = torch.randn(1, 3, 64, 64)
    stages = [1, 2, 3] if head == "retinanet" else [0, 1, 2, 3]
    with torch.no_grad():
        expected = source.forward_intermediates(images, indices=stages, intermediates_only=True)
        for ours, theirs in zip(levels.eval().body(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    others = [name for name in before if ".body." not in f".{name}"]
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in others)
    fates = {t.name: t.fate for t in report.tensors}
    assert {name for name, fate in fates.items() if fate == "initialised"} == set(others)
    left = {name for name, fate in fates.items() if fate == "left out"}
    assert left == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}


def test_another_backbone_is_refused_in_one_line(classifier):
    _, folder = classifier
    model = network("retinanet", OLD)
    chosen = settings("retinanet", name="l2vit_tiny").model
    with pytest.raises(UserError, match="holds l2vit_mini, this run's backbone is l2vit_tiny"):
        dense_weights.load_initial(model, InitConfig(str(folder)), model=chosen, classes=OLD)
